//! Whole outputs of the command line, compared with `tests/expected/NAME.txt`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot run its command has failed")]

mod shown;

use std::path::Path;

use shown::Place;

/// Runs `palisade` in tests/config and compares all that it prints.
#[track_caller]
fn expect(name: &str, args: &[&str]) {
    Place::new(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config")).expect(name, args);
}

#[test]
fn unknown_keys_and_sections_come_with_what_was_probably_meant() {
    expect("unknown-key", &["config", "check", "unknown-key.toml"]);
}

#[test]
fn unknown_services_come_with_what_was_probably_meant() {
    expect("unknown-service", &["config", "check", "unknown-service.toml"]);
}

#[test]
fn what_is_no_toml_is_shown_where_it_stops_being_toml() {
    expect("malformed", &["config", "check", "malformed.toml"]);
}

#[test]
fn a_file_that_is_not_there_is_named_with_the_way_to_get_one() {
    expect("missing", &["--config", "no-such.toml", "config", "check"]);
}

#[test]
fn identities_that_are_none_or_not_of_this_mesh_are_refused() {
    expect("bad-identity", &["config", "check", "bad-identity.toml"]);
}

#[test]
fn security_30_apps_calls_and_admin_ports_stay_on_loopback() {
    expect("not-loopback", &["config", "check", "not-loopback.toml"]);
}

#[test]
fn addresses_times_and_directories_that_cannot_be_are_refused_together() {
    expect("clashes", &["config", "check", "clashes.toml"]);
}

#[test]
fn processes_that_attest_alike_are_refused() {
    expect("alike", &["config", "check", "alike.toml"]);
    expect("covers", &["config", "check", "covers.toml"]);
}

#[test]
fn wrong_types_words_and_missing_keys_are_reported_together() {
    expect("wrong-types", &["config", "check", "wrong-types.toml"]);
}

#[test]
fn a_good_file_is_said_to_be_good() {
    expect("good", &["config", "check", "good.toml"]);
}

#[test]
fn what_nobody_has_asked_yet_is_decided_and_explained() {
    let ask = |name: &str, rest: &[&str]| {
        let question = ["--config", "bank.toml", "explain", "web", "accounts", "GET"];
        expect(name, &[&question[..], rest].concat());
    };
    ask("explain-denied", &["/accounts/17", "--user", "alice", "--attribute", "owner=bob"]);
    ask("explain-permitted", &["/accounts/17", "--user", "alice", "--attribute", "owner=alice"]);
    ask("explain-unknown-attribute", &["/accounts/17", "--user", "alice"]);
    ask("explain-refused", &["/accounts//17"]);
    ask("explain-no-question", &[]);
    ask("explain-no-attribute", &["/accounts/17", "--attribute", "owner"]);
    expect("explain-nobody", &["--config", "bank.toml", "explain", "wep", "accounts", "GET", "/accounts"]);
}

#[test]
fn problems_for_machines_are_data() {
    expect("json", &["config", "check", "alike.toml", "--json"]);
}

#[test]
fn help_is_the_table_of_contents() {
    expect("help", &["--help"]);
}

#[test]
fn a_verb_that_is_none_is_a_mistake_of_usage() {
    expect("usage", &["confg", "check"]);
}

#[test]
fn a_process_without_its_secrets_says_which_and_how_to_give_it() {
    expect("no-credentials", &["--config", "good.toml", "control"]);
}

#[test]
fn a_sidecar_of_no_service_says_which_there_are() {
    expect("no-service", &["--config", "good.toml", "sidecar", "--service", "accounts"]);
}

#[test]
fn policies_that_are_not_there_stop_a_process_before_it_starts() {
    expect("no-policies", &["--config", "good.toml", "policy", "check"]);
}

#[test]
fn a_map_is_held_against_its_service_s_description() {
    expect("described", &["--config", "described.toml", "policy", "check"]);
    expect("described-json", &["--config", "described.toml", "policy", "check", "--json"]);
}

#[test]
fn policies_are_those_of_the_directory_that_is_named() {
    let of_mesh = |name: &str, rest: &[&str]| {
        expect(name, &[&["--config", "described.toml", "policy"], rest].concat());
    };
    of_mesh("directory-test", &["test", "described"]);
    of_mesh("directory-fmt", &["fmt", "--check", "described"]);
    // What mesh.toml says of services is held against it all the same.
    expect("directory-of-others", &["--config", "bank.toml", "policy", "check", "described"]);
}

#[test]
fn policies_are_checked_where_there_is_no_mesh() {
    expect("meshless-check", &["policy", "check", "described"]);
    expect("meshless-fmt", &["policy", "fmt", "--check", "described"]);
    expect("meshless-test", &["policy", "test", "described"]);
    // The policies say whose they are; their schema has come with Palisade since it was written.
    expect("meshless-copied", &["policy", "check", "copied"]);
    expect("meshless-named", &["--config", "no-such.toml", "policy", "check", "described"]);
}

#[test]
fn a_directory_without_policies_is_none() {
    expect("directory-missing", &["policy", "check", "nowhere"]);
    expect("directory-empty", &["policy", "diff", "policies", "--against", "HEAD"]);
}

#[test]
fn a_verb_without_its_section_names_it() {
    expect("no-section", &["--config", "good.toml", "vault"]);
}

#[test]
fn asking_a_control_that_is_not_there_says_where_to_ask() {
    expect("no-control", &["--config", "good.toml", "status"]);
}
