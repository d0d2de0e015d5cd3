//! A service's schema, linked with the mesh's own: which actions there are, on which objects, with
//! which attributes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use cedar_policy::{
    Context, Entities, Entity, EntityId, EntityTypeName, EntityUid, RestrictedExpression, Schema,
    SchemaFragment,
};
use identity::{SpiffeId, TrustDomain};

use crate::object::AttributeType;
use crate::problem::{Problem, Problems};

/// The namespace that `mesh.cedarschema` declares.
pub(crate) const MESH: &str = "Mesh";

/// One attribute of an object type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttributeSpec {
    pub(crate) kind: AttributeType,
    pub(crate) required: bool,
}

/// One entity type that can be an object of this service.
#[derive(Debug, Clone)]
pub(crate) struct ObjectType {
    pub(crate) name: EntityTypeName,
    /// Its place among the service's types, by name: the same whenever the schema is.
    pub(crate) number: usize,
    pub(crate) attributes: BTreeMap<String, AttributeSpec>,
}

/// One action of this service.
#[derive(Debug, Clone)]
pub(crate) struct Action {
    pub(crate) uid: EntityUid,
    /// Its place among the service's actions, by name.
    pub(crate) number: usize,
    /// Full names of the object types it applies to.
    pub(crate) objects: HashSet<String>,
}

/// A service's linked schema.
#[derive(Debug, Clone)]
pub(crate) struct ServiceSchema {
    pub(crate) schema: Schema,
    pub(crate) namespace: String,
    pub(crate) actions: BTreeMap<String, Action>,
    pub(crate) types: foldhash::HashMap<String, ObjectType>,
    /// The action hierarchy, which `action in …` needs in every request.
    pub(crate) action_entities: Entities,
    pub(crate) principals: PrincipalTypes,
    /// What `context.user` may have besides.
    pub(crate) user: UserShape,
}

/// The two types of callers.
#[derive(Debug, Clone)]
pub(crate) struct PrincipalTypes {
    pub(crate) workload: EntityTypeName,
    pub(crate) client: EntityTypeName,
}

impl ServiceSchema {
    /// Whether an action is a group or stands within it.
    pub(crate) fn is_within(&self, action: &EntityUid, group: &EntityUid) -> bool {
        action == group || self.action_entities.is_ancestor_of(group, action)
    }

    /// The full name of an object type as written in a map: `Account` means the service's own.
    pub(crate) fn full_kind(&self, written: &str) -> String {
        if written.contains("::") { written.to_owned() } else { format!("{}::{written}", self.namespace) }
    }
}

/// One schema file, parsed.
pub(crate) struct SchemaFile<'a> {
    pub(crate) path: &'a Path,
    pub(crate) text: &'a str,
    pub(crate) fragment: SchemaFragment,
}

impl<'a> SchemaFile<'a> {
    pub(crate) fn parse(path: &'a Path, text: &'a str, problems: &mut Problems) -> Option<Self> {
        match SchemaFragment::from_cedarschema_str(text) {
            Ok((fragment, warnings)) => {
                for warning in warnings {
                    problems.push(Problem::cedar(path, text, &warning));
                }
                Some(Self { path, text, fragment })
            }
            Err(error) => {
                problems.push(Problem::cedar(path, text, &error));
                None
            }
        }
    }

    /// Its only namespace.
    fn namespace(&self) -> Result<String, Problem> {
        let names: Vec<Option<String>> =
            self.fragment.namespaces().map(|name| name.map(|n| n.to_string())).collect();
        match names.as_slice() {
            [Some(name)] => Ok(name.clone()),
            _ => {
                Err(Problem::file(self.path, "a schema declares exactly one namespace, and everything in it")
                    .hint("wrap the file in `namespace Name { … }`"))
            }
        }
    }
}

/// Checks the mesh's own file and links a service's with it.
pub(crate) fn link(
    mesh: &SchemaFile<'_>,
    own: &SchemaFile<'_>,
    trust_domain: &TrustDomain,
) -> Result<ServiceSchema, Problems> {
    let namespace = own.namespace()?;
    if namespace == MESH {
        let problem = Problem::file(own.path, "a service cannot declare the namespace Mesh");
        return Err(problem.hint("name the namespace after the service").into());
    }
    let schema = Schema::from_schema_fragments([mesh.fragment.clone(), own.fragment.clone()])
        .map_err(|error| Problem::cedar(own.path, own.text, &error))?;
    let action_entities =
        schema.action_entities().map_err(|error| Problem::file(own.path, error.to_string()))?;
    let principals = principal_types(mesh)?;
    check_principals(mesh, &schema, &principals, trust_domain)?;

    let mut problems = Problems::default();
    let mut actions: BTreeMap<String, Action> = BTreeMap::new();
    let mut types: foldhash::HashMap<String, ObjectType> = foldhash::HashMap::default();
    for uid in schema.actions().filter(|uid| uid.type_name().namespace() == namespace) {
        check_action(mesh, own, &schema, uid, &mut problems);
        let objects: HashSet<String> =
            schema.resources_for_action(uid).into_iter().flatten().map(ToString::to_string).collect();
        for name in schema.resources_for_action(uid).into_iter().flatten() {
            match object_type(own, &schema, name) {
                Ok(kind) => drop(types.insert(name.to_string(), kind)),
                Err(problem) => problems.push(problem),
            }
        }
        actions.insert(uid.id().unescaped().to_owned(), Action { uid: uid.clone(), number: 0, objects });
    }
    if actions.is_empty() {
        problems.push(Problem::file(own.path, format!("the namespace {namespace} declares no action")));
    }
    problems.0.dedup_by(|a, b| a.message == b.message);
    for (number, action) in actions.values_mut().enumerate() {
        action.number = number;
    }
    let mut sorted: Vec<(&String, &mut ObjectType)> = types.iter_mut().collect();
    sorted.sort_by(|a, b| a.0.cmp(b.0));
    for (number, (_, kind)) in sorted.into_iter().enumerate() {
        kind.number = number;
    }
    if problems.0.is_empty() {
        let user = UserShape::of(&schema, actions.values().map(|action| &action.uid));
        Ok(ServiceSchema { schema, namespace, actions, types, action_entities, principals, user })
    } else {
        Err(problems)
    }
}

fn principal_types(mesh: &SchemaFile<'_>) -> Result<PrincipalTypes, Problem> {
    let parse = |name: &str| {
        format!("{MESH}::{name}")
            .parse()
            .map_err(|_| Problem::file(mesh.path, format!("no type {MESH}::{name}")))
    };
    Ok(PrincipalTypes { workload: parse("Workload")?, client: parse("Client")? })
}

/// The principals that requests will carry must be what the schema declares: found out at load, not by
/// every request being denied.
fn check_principals(
    mesh: &SchemaFile<'_>,
    schema: &Schema,
    types: &PrincipalTypes,
    trust_domain: &TrustDomain,
) -> Result<(), Problem> {
    let wrong = |error: String| {
        Problem::file(mesh.path, format!("the mesh's types are not as requests carry them: {error}")).hint(
            "entity Workload = { service: String, trust_domain: String }; entity Client; both in namespace Mesh",
        )
    };
    let id = trust_domain.workload("/service/example").map_err(|error| wrong(error.to_string()))?;
    let workload = workload_entity(types, &id).ok_or_else(|| wrong("Workload".into()))?;
    let client = client_entity(types, "example");
    Entities::from_entities([workload, client], Some(schema)).map_err(|error| wrong(error.to_string()))?;
    Ok(())
}

fn check_action(
    mesh: &SchemaFile<'_>,
    own: &SchemaFile<'_>,
    schema: &Schema,
    uid: &EntityUid,
    problems: &mut Problems,
) {
    let principals: Vec<String> =
        schema.principals_for_action(uid).into_iter().flatten().map(ToString::to_string).collect();
    // An action that applies to nothing is a group of actions.
    if principals.is_empty() {
        return;
    }
    if let Some(other) = principals.iter().find(|p| *p != "Mesh::Workload" && *p != "Mesh::Client") {
        let message = format!("{uid} applies to the principal {other}, which no request carries");
        problems.push(
            Problem::file(own.path, message).hint("principal: [Mesh::Workload]; the user is context.user"),
        );
    }
    for user in [None, Some(sample_user(UserShape::default()))] {
        let context = context(user, vec!["spiffe://example/service/example".to_owned()], 0);
        let checked = context
            .map_err(|e| e.to_string())
            .and_then(|c| c.validate(schema, uid).map_err(|e| e.to_string()));
        if let Err(error) = checked {
            let message = format!("the context of {uid} is not what requests carry: {error}");
            let hint = format!("context: Mesh::Context, as {} declares it", mesh.path.display());
            problems.push(Problem::file(own.path, message).hint(hint));
            return;
        }
    }
}

/// What `context.user` may have besides what it always has: members that the mesh's schema declares as optional.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct UserShape {
    tenant: bool,
    mfa: bool,
}

impl UserShape {
    /// Those members that every action takes, there or not there.
    fn of<'a>(schema: &Schema, actions: impl Iterator<Item = &'a EntityUid> + Clone) -> Self {
        let taken = |shape: Self| {
            let mut named = actions
                .clone()
                .filter(|uid| schema.principals_for_action(uid).into_iter().flatten().next().is_some());
            let chain = || ["spiffe://example/service/example".to_owned()];
            named.all(|uid| {
                let context = context(Some(sample_user(shape)), chain(), 0);
                context.is_ok_and(|context| context.validate(schema, uid).is_ok())
            })
        };
        // Each by itself is there with the other away, so both are optional.
        let tenant = taken(Self { tenant: true, mfa: false });
        Self { tenant, mfa: taken(Self { tenant: false, mfa: true }) }
    }
}

pub(crate) fn sample_user(shape: UserShape) -> RestrictedExpression {
    let user = identity::txn::User {
        id: "alice".into(),
        issuer: "https://idp.example".into(),
        client: "web".into(),
        scopes: vec!["bank".into()],
        groups: vec!["staff".into()],
        auth_time: 0,
        tenant: None,
        mfa: false,
    };
    let user = identity::txn::User { tenant: Some("bank".into()), mfa: true, ..user };
    user_record(&user, shape).unwrap_or_else(|| RestrictedExpression::new_bool(false))
}

fn object_type(own: &SchemaFile<'_>, schema: &Schema, name: &EntityTypeName) -> Result<ObjectType, Problem> {
    let declared = schema.as_ref().get_entity_type(name.as_ref());
    let mut attributes = BTreeMap::new();
    for (attribute, declared) in declared.into_iter().flat_map(|d| d.attributes().iter()) {
        let type_name = declared.attr_type.to_string();
        let kind = AttributeType::from_cedar(&type_name).ok_or_else(|| {
            Problem::file(own.path, format!("the attribute {attribute} of {name} has the type {type_name}"))
                .hint("an object's attribute is String, Long, Bool, Set<String> or Set<Long>")
        })?;
        attributes.insert(attribute.to_string(), AttributeSpec { kind, required: declared.is_required });
    }
    Ok(ObjectType { name: name.clone(), number: 0, attributes })
}

/// `service` of a workload: `web` for `/service/web`, otherwise its path without the first slash.
pub(crate) fn service_of(id: &SpiffeId) -> &str {
    let path = id.path().trim_start_matches('/');
    path.strip_prefix("service/").unwrap_or(path)
}

pub(crate) fn uid(kind: &EntityTypeName, id: &str) -> EntityUid {
    EntityUid::from_type_name_and_id(kind.clone(), EntityId::new(id))
}

pub(crate) fn workload_entity(types: &PrincipalTypes, id: &SpiffeId) -> Option<Entity> {
    let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
    let attributes = HashMap::from([
        ("service".to_owned(), text(service_of(id))),
        ("trust_domain".to_owned(), text(id.trust_domain().as_str())),
    ]);
    Entity::new(uid(&types.workload, id.as_str()), attributes, HashSet::new()).ok()
}

pub(crate) fn client_entity(types: &PrincipalTypes, id: &str) -> Entity {
    Entity::new_no_attrs(uid(&types.client, id), HashSet::new())
}

/// `context.user`, with what of it the schema has a place for.
pub(crate) fn user_record(user: &identity::txn::User, shape: UserShape) -> Option<RestrictedExpression> {
    let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
    let texts = |list: &[String]| RestrictedExpression::new_set(list.iter().map(|item| text(item)));
    let auth_time = i64::try_from(user.auth_time).ok()?;
    let always = [
        ("id".to_owned(), text(&user.id)),
        ("issuer".to_owned(), text(&user.issuer)),
        ("client".to_owned(), text(&user.client)),
        ("scopes".to_owned(), texts(&user.scopes)),
        ("groups".to_owned(), texts(&user.groups)),
        ("auth_time".to_owned(), RestrictedExpression::new_long(auth_time)),
    ];
    let tenant = user.tenant.as_deref().filter(|_| shape.tenant);
    let tenant = tenant.map(|tenant| ("tenant".to_owned(), text(tenant)));
    let mfa = shape.mfa.then(|| ("mfa".to_owned(), RestrictedExpression::new_bool(user.mfa)));
    RestrictedExpression::new_record(always.into_iter().chain(tenant).chain(mfa)).ok()
}

/// The context of every request. `now` is in seconds since the Unix epoch.
pub(crate) fn context(
    user: Option<RestrictedExpression>,
    chain: impl IntoIterator<Item = String>,
    now: i64,
) -> Result<Context, String> {
    let chain = RestrictedExpression::new_set(chain.into_iter().map(RestrictedExpression::new_string));
    let always = [("chain".to_owned(), chain), ("now".to_owned(), RestrictedExpression::new_long(now))];
    let user = user.map(|user| ("user".to_owned(), user));
    Context::from_pairs(always.into_iter().chain(user)).map_err(|error| error.to_string())
}
