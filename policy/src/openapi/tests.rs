use proptest::prelude::*;

use super::*;

fn described(text: &str) -> Vec<String> {
    let operations =
        operations(Path::new("openapi.yaml"), text).unwrap_or_else(|problem| panic!("{problem}"));
    operations.iter().map(|it| format!("{} {} {}", it.method, it.path, it.line)).collect()
}

fn problem(text: &str) -> String {
    operations(Path::new("openapi.yaml"), text).expect_err("it should not be read").to_string()
}

#[test]
fn every_method_of_a_path_item_is_an_operation_and_nothing_else_is() {
    let text = "openapi: 3.1.0
info: { title: Shop, version: '1' }
webhooks: { paid: { post: {} } }
paths:
  /orders/{id}:
    summary: One order
    parameters: [{ name: id, in: path }]
    get:
      callbacks: { done: { '{$request.body#/url}': { post: {} } } }
    put: {}
    post: {}
    delete: {}
    options: {}
    head: {}
    patch: {}
    trace: {}
    x-internal: {}
  x-more: {}
  /: { get: {} }
";
    let methods = ["GET", "PUT", "POST", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"];
    let expected = methods.iter().zip([8, 10, 11, 12, 13, 14, 15, 16]);
    let mut expected: Vec<String> =
        expected.map(|(method, line)| format!("{method} /orders/{{id}} {line}")).collect();
    expected.push("GET / 19".to_owned());
    assert_eq!(described(text), expected);
}

#[test]
fn json_is_read_too() {
    let text = "{\n\t\"openapi\": \"3.0.3\",\n\t\"paths\": {\n\t\t\"/a\\u002fb\": { \"get\": {} },\n\t\t\"/c\": {\"post\":{}}\n\t}\n}\n";
    assert_eq!(described(text), ["GET /a/b 4", "POST /c 5"]);
}

#[test]
fn path_items_are_found_by_references_and_aliases() {
    let text = "openapi: 3.1.0
paths:
  /a:
    $ref: '#/components/pathItems/both'
    get: {}
  /b: &b
    $ref: '#/paths/~1c~1%7Bid%7D'
  /c/{id}:
    delete: {}
  /d: *b
components:
  pathItems:
    both:
      get: {}
      put: {}
";
    assert_eq!(described(text), ["GET /a 5", "PUT /a 15", "DELETE /b 9", "DELETE /c/{id} 9", "DELETE /d 9"]);
    let from = |reference: &str| {
        problem(&format!("openapi: 3.1.0\npaths:\n  /a:\n    $ref: '{reference}'\n  /list: []\n"))
    };
    assert!(
        from("#/paths/~1a").starts_with("openapi.yaml:4:11: more than 8 references"),
        "{}",
        from("#/paths/~1a")
    );
    assert!(from("#/paths/~1b").contains("`#/paths/~1b` is not in this file"), "{}", from("#/paths/~1b"));
    assert!(from("#/paths/%7").contains("is not in this file"));
    assert!(from("#/paths/~1list").contains("a path item is no mapping"));
    assert!(from("other.yaml#/a").contains("one file"));
}

#[test]
fn the_paths_of_servers_count() {
    let with = |servers: &str| {
        let text = format!("openapi: 3.0.0\nservers: {servers}\npaths: {{ /a: {{ get: {{}} }} }}\n");
        let operations = operations(Path::new("openapi.yaml"), &text);
        operations.map(|found| found.iter().map(|it| it.path.clone()).collect::<Vec<_>>().join(" "))
    };
    for (servers, paths) in [
        ("[]", "/a"),
        ("[{ url: / }]", "/a"),
        ("[{ url: . }]", "/a"),
        ("[{ url: ./v1 }]", "/v1/a"),
        ("[{ url: v1/ }]", "/v1/a"),
        ("[{ url: //shop.example/v1/ }]", "/v1/a"),
        ("[{ url: 'https://shop.example' }]", "/a"),
        ("[{ url: 'https://shop.example/v1/x?y#z' }, { url: 'https://test.example/v1/x' }]", "/v1/x/a"),
        ("[{ url: /v2 }, { url: /v1 }]", "/v1/a /v2/a"),
        (
            "[{ url: 'https://{host}/{v}', variables: { host: { default: a }, v: { default: v2, enum: [v1, v2] } } }]",
            "/v1/a /v2/a",
        ),
    ] {
        assert_eq!(with(servers).unwrap(), paths, "{servers}");
    }
    for (servers, flaw) in [
        ("{}", "`servers` is no list"),
        ("[{}]", "the server has no `url`"),
        ("[{ url: ../v1 }]", "depends on where"),
        ("[{ url: '/{v}' }]", "`v` is not among `variables`"),
        ("[{ url: '/{v}', variables: { v: {} } }]", "`v` has no `default`"),
        ("[{ url: '/{v' }]", "`{` without `}`"),
    ] {
        assert!(with(servers).unwrap_err().to_string().contains(flaw), "{servers}");
    }
    let nearer = "openapi: 3.0.0
servers: [{ url: /v1 }]
paths:
  /a:
    servers: [{ url: /v2 }]
    get: { servers: [{ url: /v3 }] }
    put: {}
  /b: { get: {} }
";
    assert_eq!(described(nearer), ["GET /v3/a 6", "PUT /v2/a 7", "GET /v1/b 8"]);
}

#[test]
fn what_is_wrong_with_a_description_is_said_where_it_stands() {
    for (text, said) in [
        ("", "openapi.yaml:1:1: the file is empty"),
        ("[]", "openapi.yaml:1:1: the description is no mapping"),
        ("info: {}", "openapi.yaml:1:1: it does not say `openapi: 3.1.0`"),
        ("swagger: '2.0'", "openapi.yaml:1:10: it is Swagger"),
        ("openapi: 3.2.0\npaths: {}", "openapi.yaml:1:10: the version `3.2.0` of OpenAPI is not known"),
        ("openapi: 3.10.0\npaths: {}", "the version `3.10.0`"),
        ("openapi: 3.1.0", "there are no `paths`"),
        ("openapi: 3.1.0\npaths: []", "openapi.yaml:2:8: `paths` is no mapping"),
        ("openapi: 3.1.0\npaths:\n  a: {}", "openapi.yaml:3:3: the path `a` does not begin with `/`"),
        ("openapi: 3.1.0\npaths:\n  /a: 1", "openapi.yaml:3:7: a path item is no mapping"),
        ("openapi: 3.1.0\npaths:\n  /a: { get: }", "an operation is no mapping"),
        ("openapi: 3.1.0\npaths:\n  /ä: {}\n  /ä: {}", "openapi.yaml:4:3: the key `/ä` is there twice"),
        ("openapi: 3.1.0\npaths: &a { <<: *a }", "merge keys"),
        ("openapi: 3.1.0\npaths: &a { /a: *a }", "names what it stands in"),
        ("openapi: 3.1.0\n? [a]\n: b", "openapi.yaml:2:3: the key is no text"),
        ("openapi: 3.1.0\n---\npaths: {}", "openapi.yaml:2:1: a second document begins here"),
        ("openapi: 3.1.0\npaths: {", "openapi.yaml:2:"),
        ("openapi: 3.1.0\npaths: *a", "openapi.yaml:2:8: "),
    ] {
        assert!(problem(text).contains(said), "{text:?} {}", problem(text));
    }
    assert!(problem("openapi: 4").contains("hint: known are openapi: 3.0.x and 3.1.x"));
}

#[test]
fn descriptions_are_bounded() {
    let deep =
        |levels: usize| format!("openapi: 3.1.0\ncomponents: {}{}\n", "[".repeat(levels), "]".repeat(levels));
    assert_eq!(described(&deep(100)), Vec::<String>::new());
    assert!(problem(&deep(200)).contains("nested deeper than 128"));
    // Not one of them is deep as it is written.
    let aliases: String = (1..200).map(|n| format!("  - &a{n} [*a{}]\n", n - 1)).collect();
    let aliases = format!("openapi: 3.1.0\ncomponents:\n  - &a0 []\n{aliases}");
    assert!(problem(&aliases).contains("nested deeper than 128"), "{}", problem(&aliases));
    // What takes a billion nodes where aliases are copied takes thirty here.
    let laughs: String = (1..30).map(|n| format!("  - &a{n} [*a{0}, *a{0}]\n", n - 1)).collect();
    assert!(described(&format!("openapi: 3.1.0\ncomponents:\n  - &a0 []\n{laughs}")).is_empty());
    let keys = format!(
        "openapi: 3.1.0\ncomponents:\n  - &a {}\n{}",
        "k".repeat(10_000),
        "  - *a : b\n".repeat(10_000)
    );
    let read = allocation_counter::measure(|| assert!(described(&keys).is_empty()));
    assert!(read.bytes_max < 20 << 20, "{read:?}");
    let many = "a, ".repeat(yaml::MAX_NODES);
    assert!(problem(&format!("[{many}]")).contains("more than 1000000 values"));
    let paths: String = (0..=MAX_OPERATIONS).map(|n| format!("  /{n}: {{}}\n")).collect();
    assert!(problem(&format!("openapi: 3.1.0\npaths:\n{paths}")).contains("more than 10000 paths"));
    let servers: String = (0..MAX_SERVERS).map(|n| format!("- url: /{n}\n")).collect();
    let paths: String = (0..200).map(|n| format!("  /{n}: {{ get: {{}} }}\n")).collect();
    let both = format!("openapi: 3.1.0\nservers:\n{servers}paths:\n{paths}");
    assert!(problem(&both).contains("more than 10000 operations"));
    let values: Vec<String> = (0..9).map(|n| n.to_string()).collect();
    let variable = format!("{{ default: '', enum: [{}] }}", values.join(", "));
    let product = format!(
        "openapi: 3.1.0\nservers: [{{ url: '/{{a}}/{{b}}', variables: {{ a: {variable}, b: {variable} }} }}]\npaths: {{ /a: {{ get: {{}} }} }}"
    );
    assert!(problem(&product).contains("more than 64 URLs"), "{}", problem(&product));
    let long = format!("openapi: 3.1.0\npaths: {{ /{}: {{}} }}", "a".repeat(3000));
    assert!(problem(&long).contains("a path of more than 2048 bytes"));
}

proptest! {
    /// Any text is read or refused, and what is wrong stands within it.
    #[test]
    fn nothing_makes_it_panic(text in prop_oneof![any::<String>(), "(openapi|paths|servers|get|url|/a|\\{|\\}|\\[|\\]|:|,|-|&a|\\*a|\\$ref|#/paths|3.1.0|'|\"|\\||\\?|<<|\t| |\n){0,60}"]) {
        if let Err(problem) = operations(Path::new("openapi.yaml"), &text) {
            prop_assert!(problem.line <= text.lines().count() + 1, "{problem}");
        }
    }

    /// What was written is read, whatever form it has.
    #[test]
    fn what_is_written_is_read(
        paths in proptest::collection::btree_map("(/[a-z{}.~-]{1,9}){1,4}", proptest::sample::subsequence(METHODS.to_vec(), 1..8), 0..8),
        base in "(/[a-z0-9]{1,5}){0,3}",
    ) {
        let items = paths.iter().map(|(path, methods)| {
            let item = methods.iter().map(|method| ((*method).to_owned(), serde_json::json!({})));
            (path.clone(), serde_json::Value::Object(item.collect()))
        });
        let items: serde_json::Map<String, serde_json::Value> = items.collect();
        let document = serde_json::json!({ "openapi": "3.0.0", "paths": items, "servers": [{ "url": base }] });
        let read = operations(Path::new("openapi.json"), &format!("{document:#}")).map_err(|problem| TestCaseError::fail(problem.to_string()))?;
        let mut read: Vec<_> = read.into_iter().map(|it| (it.path, it.method)).collect();
        let expected = paths.iter().flat_map(|(path, methods)| methods.iter().map(move |method| (path, method)));
        let mut expected: Vec<_> =
            expected.map(|(path, method)| (format!("{base}{path}"), method.to_ascii_uppercase())).collect();
        read.sort();
        expected.sort();
        prop_assert_eq!(read, expected);
    }
}
