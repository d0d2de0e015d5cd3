//! A call's path and message are mapped without a panic, and whatever names an object is read alike by another parser.
#![no_main]

use std::fs;
use std::sync::{Arc, OnceLock};

use identity::TrustDomain;
use libfuzzer_sys::fuzz_target;
use policy::{Policies, ServicePolicy};
use prost_reflect::{DescriptorPool, DynamicMessage};

const PROTO: &str = r#"
syntax = "proto3";
package bank;
message Account { string id = 1; int64 branch = 2; }
message Ask { Account account = 1; oneof how { string note = 2; bytes picture = 3; } repeated sint32 tags = 4; }
message Row { string table = 1; string key = 2; bytes value = 3; }
message Rows { repeated Row rows = 1; repeated sint32 tags = 2; }
service Accounts { rpc Read(Ask) returns (Ask); rpc ReadRows(Rows) returns (Rows); }
"#;
const FILES: [(&str, &str); 5] = [
    (
        "mesh.cedarschema",
        "namespace Mesh { entity Workload = { service: String, trust_domain: String }; entity Client;\n\
         type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };\n\
         type Context = { user?: User, chain: Set<String>, now: Long }; }",
    ),
    ("services/bank/bank.proto", PROTO),
    (
        "services/bank/bank.cedarschema",
        "namespace Bank { entity Account; entity Row; \
         action Read appliesTo { principal: [Mesh::Workload], resource: [Account], context: Mesh::Context }; \
         action ReadRows appliesTo { principal: [Mesh::Workload], resource: [Row], context: Mesh::Context }; }",
    ),
    (
        "services/bank/bank.cedar",
        "@id(\"all\") permit (principal is Mesh::Workload, action == Bank::Action::\"Read\", resource);\n\
         @id(\"rows\") permit (principal is Mesh::Workload, action == Bank::Action::\"ReadRows\", resource);",
    ),
    (
        "services/bank/map.toml",
        "[[route]]\nmatch = \"POST /bank.Accounts/Read\"\naction = \"Read\"\nobject = 'Account::\"{body:/account.id}\"'\n\
         body_type = \"grpc\"\nbody = { \"account.id\" = \"id\", \"account.branch\" = \"int\" }\n\
         [[route]]\nmatch = \"POST /bank.Accounts/ReadRows\"\naction = \"ReadRows\"\n\
         object = 'Row::\"{body:/rows.table}/{body:/rows.key}\"'\n\
         body_type = \"grpc\"\nbody = { \"rows.table\" = \"[id]\", \"rows.key\" = \"[key]\" }\n",
    ),
];

fn stage() -> &'static (Arc<ServicePolicy>, DescriptorPool) {
    static STAGE: OnceLock<(Arc<ServicePolicy>, DescriptorPool)> = OnceLock::new();
    STAGE.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("fuzz-grpc-message-{}", std::process::id()));
        for (name, text) in FILES {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let policies = Policies::load(&folder, &TrustDomain::new("mesh.test").unwrap());
        let pool = protox::compile([folder.join("services/bank/bank.proto")], [folder.join("services/bank")]);
        fs::remove_dir_all(&folder).unwrap();
        let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
        let pool = DescriptorPool::from_file_descriptor_set(pool.unwrap()).unwrap();
        (policies.service("bank").unwrap(), pool)
    })
}

fuzz_target!(|input: (String, Vec<u8>)| {
    let (policy, pool) = stage();
    let (path, message) = input;
    let map = |path: &str| {
        let request = http::Request::post(path).header("content-type", "application/grpc").body(()).ok()?;
        policy.map(&request.into_parts().0).ok()
    };
    if let Some(mapped) = map(&path) {
        assert!(matches!(path.as_str(), "/bank.Accounts/Read" | "/bank.Accounts/ReadRows"));
        drop(mapped);
    }
    let mapped = map("/bank.Accounts/Read").unwrap();
    if let Ok(judged) = mapped.with_body(&message) {
        let other = decoded(pool, "bank.Ask", &message);
        let account = other.get_field_by_name("account").unwrap();
        assert_eq!(judged.objects()[0].id(), text(account.as_message().unwrap(), "id"));
    }
    // Of a list each row is named, once.
    let mapped = map("/bank.Accounts/ReadRows").unwrap();
    if let Ok(judged) = mapped.with_body(&message) {
        let other = decoded(pool, "bank.Rows", &message);
        let rows = other.get_field_by_name("rows").unwrap();
        let mut named: Vec<String> = Vec::new();
        for row in rows.as_list().unwrap() {
            let row = row.as_message().unwrap();
            let name = format!("{}/{}", text(row, "table"), text(row, "key"));
            if !named.contains(&name) {
                named.push(name);
            }
        }
        assert!(judged.objects().iter().map(|object| object.id()).eq(named.iter().map(String::as_str)));
    }
});

fn decoded(pool: &DescriptorPool, name: &str, message: &[u8]) -> DynamicMessage {
    DynamicMessage::decode(pool.get_message_by_name(name).unwrap(), message).unwrap()
}

fn text(message: &DynamicMessage, field: &str) -> String {
    message.get_field_by_name(field).unwrap().as_str().unwrap().to_owned()
}
