use super::*;
use crate::load::tests::load;

/// Policies of a service named `s`, and what stands beside them.
fn loaded(map: &str, policies: &str, beside: &[(&str, &str)]) -> Result<Loaded, String> {
    let (mut files, own) = (Vec::new(), |name: &str| format!("services/s/{name}"));
    files.push((own("map.toml"), map));
    files.push((own("s.cedar"), policies));
    files.extend(beside.iter().map(|(name, text)| ((*name).to_owned(), *text)));
    let files: Vec<_> = files.iter().map(|(name, text)| (name.as_str(), Some(*text))).collect();
    let (loaded, dir) = load(&files);
    let named =
        |problems: crate::Problems| problems.to_string().replace(&format!("{}/", dir.path().display()), "");
    loaded.map_err(named)
}

type Loaded = std::sync::Arc<crate::Policies>;

fn forbidding() -> &'static str {
    "@id(\"none\")\nforbid (principal, action, resource);"
}

#[test]
fn what_is_shipped_loads_without_a_word_of_the_service_s_own() {
    for shipped in &ALL {
        let map = format!("mapping = \"{}\"", shipped.mapping);
        let policies = loaded(&map, forbidding(), &[]).unwrap();
        let service = policies.service("s").unwrap();
        assert_eq!(service.mapping(), shipped.speaks);
        assert_eq!(service.routes().is_empty(), shipped.routes.is_none(), "{}", shipped.mapping);
        assert!(service.unmapped_methods().is_empty(), "{:?}", service.unmapped_methods());
        assert_eq!(service.shipped_as(), None);
        assert_eq!(Shipped::of_namespace(shipped.namespace).unwrap().mapping, shipped.mapping);
        // Of its modes it has a say.
        let audited = loaded(&format!("{map}\nmode = \"audit\""), forbidding(), &[]).unwrap();
        assert_eq!(audited.service("s").unwrap().mode(std::time::Duration::ZERO), crate::Mode::Audit);
    }
}

#[test]
fn what_is_shipped_is_not_written_beside_it() {
    for shipped in &ALL {
        let map = format!("mapping = \"{}\"", shipped.mapping);
        let said =
            |map: &str, beside: &[(&str, &str)]| loaded(map, forbidding(), beside).map(drop).unwrap_err();
        let schema = said(&map, &[("services/s/s.cedarschema", shipped.schema.text)]);
        assert!(schema.contains("services/s/s.cedarschema: a service of mapping"), "{schema}");
        assert!(schema.contains("has no schema of its own"), "{schema}");
        let proto = said(&map, &[("services/s/s.proto", "syntax = \"proto3\";")]);
        assert!(proto.contains("has no .proto files of its own"), "{proto}");
        let openapi = said(&map, &[("services/s/openapi.yaml", "openapi: 3.1.0\npaths: {}\n")]);
        assert!(openapi.contains("has no routes to hold a description against"), "{openapi}");
        let route = format!("{map}\n[[route]]\nmatch = \"GET /a\"\naction = \"A\"\nobject = 'B::\"c\"'\n");
        let routes = said(&route, &[]);
        assert!(routes.contains(&format!("routes or is \"{}\"", shipped.mapping)), "{routes}");
    }
}

#[test]
fn what_was_declared_before_it_was_shipped_is_good_alone_and_said() {
    for shipped in ALL.iter().filter(|shipped| shipped.may_be_declared) {
        let own = [("services/s/s.cedarschema", shipped.schema.text)];
        let policies = loaded("mapping = \"none\"", forbidding(), &own).unwrap();
        assert_eq!(policies.service("s").unwrap().shipped_as(), Some(shipped.mapping));
        // One of another kind that has the same name is its own business.
        let other = format!(
            "namespace {} {{\n  entity Shelf;\n  action Fill appliesTo {{ principal: [Mesh::Workload], resource: [Shelf], \
             context: Mesh::Context }};\n}}\n",
            shipped.namespace
        );
        let policies = loaded("mapping = \"none\"", forbidding(), &[("services/s/s.cedarschema", &other)]);
        assert_eq!(policies.unwrap().service("s").unwrap().shipped_as(), None);
        // Beside one that has what is shipped, a rule would mean two things.
        let map = format!("mapping = \"{}\"", shipped.mapping);
        for service in ["a", "z"] {
            let named = |file: &str| format!("services/{service}/{file}");
            let beside = [own[0], (&*named("map.toml"), map.as_str()), (&*named("n.cedar"), forbidding())];
            let said = loaded("mapping = \"none\"", forbidding(), &beside).map(drop).unwrap_err();
            let wanted = format!(
                "services/s/s.cedarschema: the namespace {} is declared by the service {service} too",
                shipped.namespace
            );
            assert!(said.contains(&wanted) && said.contains(&shipped.hint()), "{said}");
        }
    }
}

#[test]
fn a_namespace_that_only_means_what_is_shipped_is_nobody_else_s() {
    let kafka = Shipped::named("kafka").unwrap();
    let own = [("services/s/s.cedarschema", kafka.schema.text)];
    let said = loaded("mapping = \"none\"", forbidding(), &own).map(drop).unwrap_err();
    assert!(said.contains("cannot declare the namespace Kafka") && said.contains(&kafka.hint()), "{said}");
}

#[test]
fn policy_36_what_this_version_does_not_bring_is_refused() {
    for mapping in ["broker", "Vault", "store2", ""] {
        let map = format!("mapping = \"{mapping}\"");
        let said = loaded(&map, forbidding(), &[]).map(drop).unwrap_err();
        let wanted = format!("{map} brings none that this version knows");
        assert!(said.contains("services/s: the service s has no schema") && said.contains(&wanted), "{said}");
        let own = [("services/s/s.cedarschema", Shipped::named("vault").unwrap().schema.text)];
        let said = loaded(&map, forbidding(), &own).map(drop).unwrap_err();
        assert!(said.contains("services/s/map.toml:1:11: `mapping` is \"kafka\""), "{said}");
    }
}
