//! Reading a policies directory: everything is parsed, linked and held against everything else before
//! any of it decides a request.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use cedar_policy::{Policy, PolicyId, PolicySet, PrincipalConstraint, ValidationMode, Validator};
use identity::{SpiffeId, TrustDomain};
use prost_reflect::DescriptorPool;

use crate::decide::{PolicyEntry, ServicePolicy, Shared};
use crate::engine::Engine;
use crate::explain::Scope;
use crate::forms::{Forms, PolicyText};
use crate::map::{self, Beside, Map, Mapping};
use crate::openapi::{self, Compared};
use crate::problem::{Problem, Problems};
use crate::proto;
use crate::record::{PolicyEffect, Rule};
use crate::relations;
use crate::rings::Rings;
use crate::routes::RouteTable;
use crate::schema::{self, SchemaFile, ServiceSchema};
use crate::shadow::Shadow;
use crate::shipped::{self, Shipped};
use crate::tree::{Found, TextFile, Tree};
use crate::version::PolicyVersion;

const MESH_SCHEMA: &str = "mesh.cedarschema";
pub(crate) const SERVICES: &str = "services";
/// Where a service's tests are, which decide nothing: they are no part of a version.
pub(crate) const TESTS: &str = "tests";
const MAP: &str = "map.toml";
/// What is true of a service's objects.
const RELATIONS: &str = "relations.toml";
/// How a change reaches everybody, which decides nothing either.
const RINGS: &str = "rings.toml";
/// Where the rules above all services' own are.
pub(crate) const GUARD: &str = "guard";
/// Within it: what no policies may ever allow, which decides nothing and is proved.
pub(crate) const INVARIANTS: &str = "invariants";
/// Most services of one directory.
const MAX_SERVICES: usize = 1000;
/// Longest policy id.
const MAX_ID_BYTES: usize = 100;

/// A whole policies directory, parsed and cross-checked: one version of everything.
#[derive(Debug)]
pub struct Policies {
    services: BTreeMap<String, Arc<ServicePolicy>>,
    invariants: Vec<Invariant>,
    rings: Rings,
    version: PolicyVersion,
}

impl Policies {
    /// Reads `dir`: `mesh.cedarschema` and for every service `services/NAME/` with one `*.cedarschema`,
    /// `map.toml` and at least one `*.cedar`; `guard/*.cedar`, which forbid things at every service, and
    /// `guard/invariants/*.cedar`.
    ///
    /// # Errors
    /// All problems that were found, not only the first. Files that are not known are problems too: a
    /// part that is not understood must not be ignored.
    pub fn load(dir: &Path, trust_domain: &TrustDomain) -> Result<Arc<Self>, Problems> {
        Self::read(&Tree::on_disk(dir), None, trust_domain)
    }

    /// The same of files in memory, by their names below the directory. `name` stands before these in problems;
    /// `commit`, if they are known to be from one, is their version.
    ///
    /// # Errors
    /// As [`Policies::load`].
    pub fn from_files(
        files: &BTreeMap<String, Vec<u8>>,
        name: &Path,
        commit: Option<&str>,
        trust_domain: &TrustDomain,
    ) -> Result<Arc<Self>, Problems> {
        Self::read(&Tree::in_memory(name, files), commit, trust_domain)
    }

    /// The trust domain that the policies of a directory are written for, by the workloads that they name: that of the
    /// most of them. For whoever has no mesh.toml that says it; what cannot be read says nothing.
    pub fn trust_domain_of(dir: &Path) -> Option<TrustDomain> {
        let files = read_directory(&Tree::on_disk(dir), &mut Problems::default());
        let of_services = files.services.iter().flat_map(|service| &service.policies);
        let mut named: BTreeMap<TrustDomain, usize> = BTreeMap::new();
        for file in of_services.chain(&files.guard).chain(&files.invariants) {
            let Ok(set) = file.text.parse::<PolicySet>() else { continue };
            let literals = set.policies().flat_map(Policy::entity_literals);
            for workload in literals.filter_map(|literal| SpiffeId::new(literal.id().unescaped()).ok()) {
                *named.entry(workload.trust_domain().clone()).or_default() += 1;
            }
        }
        named.into_iter().max_by_key(|(_, times)| *times).map(|(trust_domain, _)| trust_domain)
    }

    fn read(
        tree: &Tree<'_>,
        commit: Option<&str>,
        trust_domain: &TrustDomain,
    ) -> Result<Arc<Self>, Problems> {
        let mut problems = Problems::default();
        let files = read_directory(tree, &mut problems);
        if !problems.0.is_empty() {
            return Err(problems);
        }
        let version = commit.map_or_else(|| PolicyVersion::of(files.all()), PolicyVersion::of_commit);
        let Some(mesh) = SchemaFile::parse(&files.mesh.path, &files.mesh.text, &mut problems) else {
            return Err(problems);
        };
        let mut services = BTreeMap::new();
        let mut namespaces: HashMap<String, &ServiceFiles> = HashMap::new();
        for service in &files.services {
            let Some(policy) =
                load_service(service, &files.guard, &mesh, trust_domain, &version, &mut problems)
            else {
                continue;
            };
            let first = *namespaces.entry(policy.0.clone()).or_insert(service);
            if first.name != service.name {
                problems.0.extend(clash(&policy.0, first, service));
            }
            services.insert(service.name.clone(), Arc::new(policy.1));
        }
        let invariants = load_invariants(&files.invariants, trust_domain, &mut problems);
        let rings = files.rings.as_ref().map(|file| Rings::parse(&file.path, &file.text, &mut problems));
        if !problems.0.is_empty() {
            return Err(problems);
        }
        let rings = rings.flatten().unwrap_or_default();
        Ok(Arc::new(Self { services, invariants, rings, version }))
    }

    /// How a change reaches everybody.
    pub fn rings(&self) -> &Rings {
        &self.rings
    }

    /// What no policies may ever allow.
    pub fn invariants(&self) -> &[Invariant] {
        &self.invariants
    }

    /// The policy of one service; without one, everything is to be denied.
    pub fn service(&self, name: &str) -> Option<Arc<ServicePolicy>> {
        self.services.get(name).cloned()
    }

    /// All services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServicePolicy>> {
        self.services.values()
    }

    /// The version of the directory.
    pub fn version(&self) -> &PolicyVersion {
        &self.version
    }
}

/// Of the files of a policies directory, those that each service's decisions take: the schemas, its map, its policies
/// and the ones that guard every service. By their names only: what is in them is for [`Policies::from_files`] to say.
pub fn slices(files: &BTreeMap<String, Vec<u8>>) -> BTreeMap<String, BTreeMap<String, Vec<u8>>> {
    let mut slices: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    for (name, content) in files {
        if let [SERVICES, service, file] = name.split('/').collect::<Vec<_>>()[..]
            && !openapi::NAMES.contains(&file)
        {
            slices.entry(service.to_owned()).or_default().insert(name.clone(), content.clone());
        }
    }
    let of_all = files
        .iter()
        .filter(|(name, _)| matches!(name.split('/').collect::<Vec<_>>()[..], [MESH_SCHEMA] | [GUARD, _]));
    for (name, content) in of_all {
        for slice in slices.values_mut() {
            slice.insert(name.clone(), content.clone());
        }
    }
    slices
}

/// Something that no policies may ever allow, written as the `forbid` that nobody has to rely on.
#[derive(Debug, Clone)]
pub struct Invariant {
    /// Its `@id`.
    pub id: Arc<str>,
    /// Its file, below the policies directory.
    pub file: Arc<str>,
    /// Its first line.
    pub line: usize,
    /// As Cedar has it.
    pub policy: cedar_policy::Policy,
}

struct ServiceFiles {
    name: String,
    /// None where it is `shipped`.
    schema: Option<TextFile>,
    /// What Palisade brings with it, by its map's `mapping`.
    shipped: Option<&'static Shipped>,
    map: TextFile,
    policies: Vec<TextFile>,
    relations: Option<TextFile>,
    /// What gRPC messages are.
    protos: Vec<TextFile>,
    /// Which routes it says there are.
    openapi: Option<TextFile>,
}

struct Files {
    mesh: TextFile,
    rings: Option<TextFile>,
    guard: Vec<TextFile>,
    invariants: Vec<TextFile>,
    services: Vec<ServiceFiles>,
}

impl Files {
    /// What decides.
    fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        let services = self.services.iter();
        let files = services.flat_map(|s| {
            let map = std::iter::once(&s.map);
            s.schema.iter().chain(map).chain(&s.policies).chain(&s.relations).chain(&s.protos)
        });
        std::iter::once(&self.mesh)
            .chain(&self.guard)
            .chain(files)
            .map(|file| (file.name.as_str(), file.text.as_str()))
    }
}

fn read_directory(tree: &Tree<'_>, problems: &mut Problems) -> Files {
    let dir = tree.root();
    let mut rings = None;
    for entry in tree.entries(dir, problems) {
        let known = match entry.name.as_str() {
            MESH_SCHEMA => !entry.is_dir,
            RINGS if !entry.is_dir => {
                rings = Some(tree.read(&entry.path, problems));
                true
            }
            SERVICES | GUARD => entry.is_dir,
            _ => false,
        };
        if !known {
            problems.push(Problem::file(&entry.path, "not a part of a policies directory that this version knows").hint(
                format!("known are {MESH_SCHEMA}, {RINGS}, {GUARD}/ and {SERVICES}/; files that begin with a dot or end in .md are not read"),
            ));
        }
    }
    // An unreadable directory is said once, not once a file.
    let readable = problems.0.is_empty();
    let mesh = if readable { tree.read(&dir.join(MESH_SCHEMA), problems) } else { empty_file(dir) };
    let (mut services, mut guard, mut invariants) = (Vec::new(), Vec::new(), Vec::new());
    if readable && tree.is_dir(&dir.join(GUARD)) {
        guard = read_policies(tree, &dir.join(GUARD), Some(INVARIANTS), problems);
        let within = dir.join(GUARD).join(INVARIANTS);
        if tree.is_dir(&within) {
            invariants = read_policies(tree, &within, None, problems);
        }
    }
    if readable {
        let directory = dir.join(SERVICES);
        for entry in tree.entries(&directory, problems) {
            if entry.is_dir && is_service_name(&entry.name) {
                services.extend(read_service(tree, &entry, problems));
            } else {
                problems.push(
                    Problem::file(&entry.path, "not a service's directory")
                        .hint("a service is a directory named with a-z, 0-9 and `-`"),
                );
            }
        }
        if services.is_empty() && problems.0.is_empty() {
            let hint = format!("make {SERVICES}/NAME/ with NAME.cedarschema, {MAP} and NAME.cedar");
            problems.push(Problem::file(&directory, "there is no service").hint(hint));
        }
        if services.len() > MAX_SERVICES {
            problems.push(Problem::file(&directory, format!("more than {MAX_SERVICES} services")));
        }
    }
    Files { mesh, rings, guard, invariants, services }
}

/// The `*.cedar` files of a directory that holds nothing else, but for one directory.
fn read_policies(
    tree: &Tree<'_>,
    dir: &Path,
    directory: Option<&str>,
    problems: &mut Problems,
) -> Vec<TextFile> {
    let mut files = Vec::new();
    for entry in tree.entries(dir, problems) {
        if entry.is_dir && Some(entry.name.as_str()) == directory {
            continue;
        }
        if entry.is_dir || entry.path.extension().is_none_or(|extension| extension != "cedar") {
            let known = directory.map_or(String::new(), |directory| format!(" and {directory}/"));
            let problem = Problem::file(&entry.path, "not a file of policies");
            problems.push(problem.hint(format!("known here are *.cedar{known}")));
            continue;
        }
        files.push(tree.read(&entry.path, problems));
    }
    files
}

fn load_invariants(
    files: &[TextFile],
    trust_domain: &TrustDomain,
    problems: &mut Problems,
) -> Vec<Invariant> {
    let mut invariants: Vec<Invariant> = Vec::new();
    for file in files {
        for (entry, policy) in forbidding(file, trust_domain, problems) {
            if let Some(other) = invariants.iter().find(|other| other.id == entry.id) {
                let message = format!("the id `{}` is taken by {}:{}", entry.id, other.file, other.line);
                problems.push(at_policy(file, &policy, message));
            }
            let PolicyEntry { id, file, line, .. } = entry;
            invariants.push(Invariant { id, file, line, policy });
        }
    }
    invariants
}

/// The policies of a file that may only forbid.
fn forbidding(
    file: &TextFile,
    trust_domain: &TrustDomain,
    problems: &mut Problems,
) -> Vec<(PolicyEntry, Policy)> {
    let entries = parse_policies(file, trust_domain, problems);
    for (entry, policy) in &entries {
        if entry.effect == PolicyEffect::Permit {
            problems.push(
                at_policy(
                    file,
                    policy,
                    format!("`{}` is a permit in {GUARD}/, which forbids only", entry.id),
                )
                .hint("what a service permits stands in its own directory"),
            );
        }
    }
    entries
}

fn is_service_name(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') && !name.starts_with('-')
}

fn read_service(tree: &Tree<'_>, service: &Found, problems: &mut Problems) -> Option<ServiceFiles> {
    let (mut schemas, mut maps, mut policies, mut protos) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut relations, mut openapi) = (None, Vec::new());
    for entry in tree.entries(&service.path, problems) {
        let extension = entry.path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        match (entry.is_dir, extension) {
            (false, "cedarschema") => schemas.push(tree.read(&entry.path, problems)),
            (false, "cedar") => policies.push(tree.read(&entry.path, problems)),
            (false, "proto") => protos.push(tree.read(&entry.path, problems)),
            (true, _) if entry.name == TESTS => {}
            (false, _) if entry.name == MAP => maps.push(tree.read(&entry.path, problems)),
            (false, _) if entry.name == RELATIONS => relations = Some(tree.read(&entry.path, problems)),
            (false, _) if openapi::NAMES.contains(&entry.name.as_str()) => {
                openapi.push(tree.read(&entry.path, problems));
            }
            _ => problems.push(
                Problem::file(&entry.path, "not a file of a service that this version knows").hint(format!(
                    "known are *.cedarschema, *.cedar, *.proto, {MAP}, {RELATIONS}, openapi.yaml and {TESTS}/"
                )),
            ),
        }
    }
    let missing =
        |what: &str| Problem::file(&service.path, format!("the service {} has no {what}", service.name));
    let mapping = maps.first().and_then(|map| shipped::mapping_of(&map.text));
    let shipped = mapping.as_deref().and_then(Shipped::named);
    if schemas.is_empty() && shipped.is_none() {
        let unknown = mapping.filter(|mapping| !matches!(mapping.as_str(), "none" | "tcp"));
        let hint =
            unknown.map(|mapping| format!("mapping = \"{mapping}\" brings none that this version knows"));
        problems.push(missing(&format!("schema ({}.cedarschema)", service.name)).maybe_hint(hint));
    }
    if maps.is_empty() {
        problems.push(missing(MAP));
    }
    if policies.is_empty() {
        problems.push(missing(&format!("policies ({}.cedar)", service.name)));
    }
    if let [_, other, ..] = openapi.as_slice() {
        problems.push(Problem::file(&other.path, "the service has another OpenAPI description beside it"));
    }
    if let Some(Shipped { mapping, .. }) = shipped {
        for (what, file) in [("schema", schemas.first()), (".proto files", protos.first())] {
            let Some(file) = file else { continue };
            let message = format!("a service of mapping = \"{mapping}\" has no {what} of its own");
            problems.push(Problem::file(&file.path, message).hint("remove it: it comes with the mapping"));
        }
    }
    if schemas.len() > 1 {
        problems
            .push(Problem::file(&service.path, format!("the service {} has several schemas", service.name)));
    }
    Some(ServiceFiles {
        name: service.name.clone(),
        schema: schemas.pop(),
        shipped,
        map: maps.pop()?,
        policies,
        relations,
        protos,
        openapi: openapi.pop(),
    })
}

fn empty_file(path: &Path) -> TextFile {
    TextFile { path: path.to_owned(), name: String::new(), text: String::new() }
}

/// A file that comes with Palisade, as if it were one of the directory.
fn text_file(file: &shipped::File) -> TextFile {
    TextFile { path: file.name.into(), name: file.name.to_owned(), text: file.text.to_owned() }
}

/// What is wrong with two services of one namespace: unless it is Palisade's to both, a rule about it would mean two things.
fn clash(namespace: &str, one: &ServiceFiles, other: &ServiceFiles) -> Option<Problem> {
    let (schema, who) = match (&one.schema, &other.schema) {
        (_, Some(schema)) => (schema, one),
        (Some(schema), None) => (schema, other),
        (None, None) => return None,
    };
    let message = format!("the namespace {namespace} is declared by the service {} too", who.name);
    let problem = Problem::file(&schema.path, message);
    Some(match who.shipped {
        Some(shipped) => problem.hint(format!("{}, as there", shipped.hint())),
        None => problem,
    })
}

/// Whether a schema says nothing but what comes with Palisade.
fn is_copy(schema: &ServiceSchema, of: &Shipped, mesh: &SchemaFile<'_>, trust_domain: &TrustDomain) -> bool {
    let original = SchemaFile::parse(Path::new(of.schema.name), of.schema.text, &mut Problems::default());
    let original = original.and_then(|file| schema::link(mesh, &file, trust_domain).ok());
    original.is_some_and(|original| {
        schema.actions.keys().all(|action| original.actions.contains_key(action))
            && schema.types.keys().all(|kind| original.types.contains_key(kind))
    })
}

fn load_service(
    files: &ServiceFiles,
    guard: &[TextFile],
    mesh: &SchemaFile<'_>,
    trust_domain: &TrustDomain,
    version: &PolicyVersion,
    problems: &mut Problems,
) -> Option<(String, ServicePolicy)> {
    let (path, text) = match (&files.schema, files.shipped) {
        (Some(schema), _) => (schema.path.as_path(), schema.text.as_str()),
        (None, shipped) => shipped.map(|shipped| (Path::new(shipped.schema.name), shipped.schema.text))?,
    };
    let own = SchemaFile::parse(path, text, problems)?;
    let schema = match schema::link(mesh, &own, trust_domain) {
        Ok(schema) => schema,
        Err(found) => {
            problems.0.extend(found.0);
            return None;
        }
    };
    let known = Shipped::of_namespace(&schema.namespace).filter(|_| files.shipped.is_none());
    if let Some(known) = known.filter(|known| !known.may_be_declared) {
        let message = format!("a service cannot declare the namespace {}", known.namespace);
        problems.push(Problem::file(path, message).hint(known.hint()));
        return None;
    }
    // Both are looked at even if one has problems.
    let protos = match files.shipped.and_then(|shipped| shipped.routes.as_ref()) {
        Some(routes) => descriptors(&[text_file(&routes.proto)], problems),
        None => descriptors(&files.protos, problems),
    };
    let relations =
        files.relations.as_ref().map(|file| relations::parse(&file.path, &file.text, &schema, problems));
    let relations = match relations {
        Some(parsed) => Some(Arc::new(parsed?)),
        None => None,
    };
    let beside = Beside { protos: protos.as_ref(), relations: relations.as_ref() };
    let map = map::parse(&files.map.path, &files.map.text, &schema, beside, problems);
    let loaded = load_policies(files, guard, &schema, trust_domain, problems);
    let (map, policies) = (map?, loaded?);
    let methods = protos.as_ref().map(proto::methods).unwrap_or_default();
    let is_mapped = |path: &String| map.routes.iter().any(|route| route.takes("POST", path));
    let unmapped = methods.into_iter().filter(|path| !is_mapped(path)).collect();
    let namespace = schema.namespace.clone();
    let described =
        files.openapi.as_ref().and_then(|file| described(file, files, &map, problems)).unwrap_or_default();
    let (mode, audit_until, max_age) = (map.mode, map.audit_until, map.max_age);
    let shared = assemble(&files.name, trust_domain, version, schema, map, policies);
    let shipped_as = known.filter(|known| is_copy(&shared.schema, known, mesh, trust_domain));
    let shipped_as = shipped_as.map(|known| known.mapping);
    let shared = Shared { unmapped, described, shipped_as, ..shared };
    Some((namespace, ServicePolicy::new(shared, mode, audit_until, max_age)))
}

/// The service's OpenAPI description, held against its map.
fn described(file: &TextFile, files: &ServiceFiles, map: &Map, problems: &mut Problems) -> Option<Compared> {
    if map.mapping != Mapping::Routes || files.shipped.is_some() {
        let problem =
            Problem::file(&file.path, "the service's map has no routes to hold a description against");
        problems.push(problem.hint(format!("take the file out, or `mapping` out of {MAP}")));
        return None;
    }
    match openapi::operations(&file.path, &file.text) {
        Ok(operations) => Some(openapi::compare(&operations, &map.routes, &file.name)),
        Err(problem) => {
            problems.push(problem);
            None
        }
    }
}

/// What the service's `.proto` files say, if it has some.
fn descriptors(files: &[TextFile], problems: &mut Problems) -> Option<DescriptorPool> {
    let first = files.first()?;
    let base = |file: &TextFile| file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = files.iter().map(base).collect();
    let sources: Vec<proto::Source<'_>> =
        files.iter().zip(&names).map(|(file, name)| proto::Source { name, text: &file.text }).collect();
    match proto::compile(&sources) {
        Ok(pool) => Some(pool),
        Err(error) => {
            let file = proto::at_fault(&error, &sources).and_then(|at| files.get(at)).unwrap_or(first);
            problems.push(Problem::cedar(&file.path, &file.text, &error));
            None
        }
    }
}

fn assemble(
    name: &str,
    trust_domain: &TrustDomain,
    version: &PolicyVersion,
    schema: ServiceSchema,
    map: Map,
    policies: Vec<(PolicyEntry, Policy)>,
) -> Shared {
    let engine = Engine::new(&schema, &policies);
    let (entries, policies): (Vec<_>, Vec<_>) = policies.into_iter().unzip();
    Shared {
        name: name.to_owned(),
        trust_domain: trust_domain.clone(),
        routes: RouteTable::new(name, version, map.routes),
        mapping: map.mapping,
        unmapped: Vec::new(),
        shipped_as: None,
        described: Compared::default(),
        forms: Forms::new(policies, |at| engine.is_for_cedar(at)),
        engine,
        shadow: Shadow::default(),
        schema,
        entries: entries.into(),
        version: version.clone(),
        relations_max_age: map.relations_max_age,
    }
}

fn load_policies(
    files: &ServiceFiles,
    guard: &[TextFile],
    schema: &ServiceSchema,
    trust_domain: &TrustDomain,
    problems: &mut Problems,
) -> Option<Vec<(PolicyEntry, Policy)>> {
    let before = problems.0.len();
    let mut set = PolicySet::new();
    let mut entries: Vec<(PolicyEntry, Policy)> = Vec::new();
    let mut taken: HashMap<Arc<str>, usize> = HashMap::new();
    let own = files.policies.iter().map(|file| (file, false));
    for (file, guards) in own.chain(guard.iter().map(|file| (file, true))) {
        let parsed = if guards {
            forbidding(file, trust_domain, problems)
        } else {
            parse_policies(file, trust_domain, problems)
        };
        for (entry, policy) in parsed {
            if let Some((message, hint)) = files.shipped.and_then(|shipped| (shipped.flaw)(&policy)) {
                problems.push(at_policy(file, &policy, message).hint(hint));
            }
            let other = taken.get(&entry.id).and_then(|other| entries.get(*other));
            if let Some((other, _)) = other {
                let message = format!("the id `{}` is taken by {}:{}", entry.id, other.file, other.line);
                problems.push(at_policy(file, &policy, message));
            } else if let Err(error) = set.add(policy.clone()) {
                problems.push(at_policy(file, &policy, error.to_string()));
            }
            taken.entry(Arc::clone(&entry.id)).or_insert(entries.len());
            entries.push((entry, policy));
        }
    }
    if problems.0.len() > before {
        return None;
    }
    if entries.is_empty() {
        let message = format!("the service {} has no policy, so every request would be denied", files.name);
        let path = files.policies.first().map_or(files.map.path.as_path(), |file| file.path.as_path());
        problems.push(Problem::file(path, message));
        return None;
    }
    validate(files, guard, schema, &set, &entries, problems);
    (problems.0.len() == before).then_some(entries)
}

/// The policies of one file, in its order, under their `@id`s.
fn parse_policies(
    file: &TextFile,
    trust_domain: &TrustDomain,
    problems: &mut Problems,
) -> Vec<(PolicyEntry, Policy)> {
    let set: PolicySet = match file.text.parse() {
        Ok(set) => set,
        Err(errors) => {
            let errors: &cedar_policy::ParseErrors = &errors;
            for error in errors.iter() {
                problems.push(Problem::cedar(&file.path, &file.text, error));
            }
            return Vec::new();
        }
    };
    for template in set.templates() {
        let span = template.as_ref().loc().map_or(0..0, |loc| loc.start()..loc.end());
        problems.push(
            Problem::at(
                &file.path,
                &file.text,
                span,
                "a template (`?principal`, `?resource`) is not a policy",
            )
            .hint("write out the policy for each caller"),
        );
    }
    let name: Arc<str> = file.name.as_str().into();
    let mut policies: Vec<_> = set.policies().collect();
    policies.sort_by_key(|policy| policy.as_ref().loc().map_or(0, |loc| loc.start()));
    let mut entries = Vec::new();
    // The policies are in the order of the text, so that it is read once for the line of each.
    let (mut read, mut line) = (0, 1);
    for policy in policies {
        let Some(id) = policy.annotation("id").filter(|id| is_policy_id(id)) else {
            problems.push(
                at_policy(
                    file,
                    policy,
                    "the policy has no `@id`, or one with other characters than A-Z a-z 0-9 . _ -",
                )
                .hint("@id(\"who-may-do-what\")"),
            );
            continue;
        };
        check_principals(file, policy, trust_domain, problems);
        let start = policy.as_ref().loc().map_or(0, |loc| loc.start());
        line += file.text.get(read..start).unwrap_or_default().matches('\n').count();
        read = start.max(read);
        let Some(text) = PolicyText::of(policy) else {
            problems.push(at_policy(file, policy, "the policy has no place in its file"));
            continue;
        };
        let (id, file): (Arc<str>, Arc<str>) = (id.into(), Arc::clone(&name));
        let named = policy.new_id(PolicyId::new(&id));
        let entry = PolicyEntry {
            rule: Rule::Policy { id: Arc::clone(&id), file: Arc::clone(&file), line },
            id,
            file,
            line,
            effect: policy.effect().into(),
            scope: Scope::of(policy),
            text,
        };
        entries.push((entry, named));
    }
    entries
}

fn is_policy_id(id: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(allowed)
}

/// A workload is named by a SPIFFE ID of this trust domain, and a permit says who is meant.
fn check_principals(
    file: &TextFile,
    policy: &cedar_policy::Policy,
    trust_domain: &TrustDomain,
    problems: &mut Problems,
) {
    for literal in policy.entity_literals() {
        if literal.type_name().to_string() != "Mesh::Workload" {
            continue;
        }
        let written = literal.id().unescaped();
        match SpiffeId::new(written) {
            Err(error) => problems.push(
                at_policy(file, policy, format!("`{written}` names no workload: {error}"))
                    .hint(format!("Mesh::Workload::\"spiffe://{trust_domain}/service/NAME\"")),
            ),
            Ok(id) if id.trust_domain() != trust_domain => problems.push(
                at_policy(file, policy, format!("`{written}` is not of the trust domain {trust_domain}"))
                    .hint("callers of other trust domains are denied, so this would never apply"),
            ),
            Ok(_) => {}
        }
    }
    let anyone = policy.principal_constraint() == PrincipalConstraint::Any;
    if anyone && policy.effect() == cedar_policy::Effect::Permit {
        problems.push(
            at_policy(file, policy, "a permit for any principal: a user's right alone makes every workload its deputy")
                .hint("principal == Mesh::Workload::\"spiffe://…\", or `principal is Mesh::Workload` if any is meant"),
        );
    }
}

fn at_policy(file: &TextFile, policy: &cedar_policy::Policy, message: impl Into<String>) -> Problem {
    let span = policy.as_ref().loc().map_or(0..0, |loc| loc.start()..loc.end());
    Problem::at(&file.path, &file.text, span, message)
}

/// Strict validation; a warning (a policy that can never apply, look-alike letters) is a problem too.
fn validate(
    files: &ServiceFiles,
    guard: &[TextFile],
    schema: &ServiceSchema,
    set: &PolicySet,
    entries: &[(PolicyEntry, Policy)],
    problems: &mut Problems,
) {
    let result = Validator::new(schema.schema.clone()).validate(set, ValidationMode::Strict);
    let file_of = |id: &PolicyId| {
        let entry = entries.iter().find(|(_, policy)| policy.id() == id);
        files
            .policies
            .iter()
            .chain(guard)
            .find(|file| entry.is_some_and(|(entry, _)| *file.name == *entry.file))
    };
    let mut found = Vec::new();
    for error in result.validation_errors() {
        if let Some(file) = file_of(error.policy_id()) {
            found.push(Problem::cedar(&file.path, &file.text, error));
        }
    }
    for warning in result.validation_warnings() {
        if let Some(file) = file_of(warning.policy_id()) {
            found.push(Problem::cedar(&file.path, &file.text, warning));
        }
    }
    if found.is_empty() && !result.validation_passed() {
        found.push(Problem::file(&files.map.path, result.to_string()));
    }
    found.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    problems.0.extend(found);
}

#[cfg(test)]
pub(crate) mod tests;
