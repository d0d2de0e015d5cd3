//! A description is read or refused where it stands, and changes nothing of what is decided.
#![no_main]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use identity::TrustDomain;
use libfuzzer_sys::fuzz_target;
use policy::{Policies, PolicyVersion};

const FILES: [(&str, &str); 4] = [
    (
        "mesh.cedarschema",
        "namespace Mesh { entity Workload = { service: String, trust_domain: String }; entity Client;\n\
         type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };\n\
         type Context = { user?: User, chain: Set<String>, now: Long }; }",
    ),
    (
        "services/bank/bank.cedarschema",
        "namespace Bank { entity Account; \
         action Read appliesTo { principal: [Mesh::Workload], resource: [Account], context: Mesh::Context }; }",
    ),
    ("services/bank/bank.cedar", "@id(\"all\") permit (principal is Mesh::Workload, action, resource);"),
    (
        "services/bank/map.toml",
        "[[route]]\nmatch = \"GET /a/{id}\"\naction = \"Read\"\nobject = 'Account::\"{id}\"'\n",
    ),
];

fn load(description: Option<&str>) -> Result<PolicyVersion, Vec<(String, usize)>> {
    let mut files: BTreeMap<String, Vec<u8>> =
        FILES.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect();
    if let Some(text) = description {
        files.insert("services/bank/openapi.yaml".to_owned(), text.as_bytes().to_vec());
    }
    let domain = TrustDomain::new("mesh.test").unwrap();
    let policies = Policies::from_files(&files, Path::new("policies"), None, &domain);
    policies.map(|policies| policies.version().clone()).map_err(|problems| {
        problems.0.iter().map(|problem| (problem.file.display().to_string(), problem.line)).collect()
    })
}

fuzz_target!(|text: &str| {
    static WITHOUT: OnceLock<PolicyVersion> = OnceLock::new();
    match load(Some(text)) {
        Ok(version) => assert_eq!(&version, WITHOUT.get_or_init(|| load(None).unwrap())),
        Err(problems) => {
            let [(file, line)] = &problems[..] else { panic!("{problems:?}") };
            assert_eq!(file, "policies/services/bank/openapi.yaml");
            assert!(*line <= text.lines().count() + 1);
        }
    }
});
