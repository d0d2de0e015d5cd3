//! Policy routing: what is marked is delivered here, whosever address it was meant for.
//!
//! Ours is known by its protocol number, which no routing daemon uses, and only that is removed.

use serde::Deserialize;

use super::host::{Host, Refused};
use super::ruleset::MARK;
use crate::failure::Failure;

const TABLE: &str = "15006";
/// After `local` (0) and before `main` (32766).
const PRIORITY: &str = "15006";
/// Who made a rule or route, in the numbers that are free for anybody (linux/rtnetlink.h, from RTPROT_STATIC on).
const PROTOCOL: &str = "112";
const FAMILIES: [(&str, &str); 2] = [("-4", "IPv4"), ("-6", "IPv6")];
/// How the kernel and `ip` say that a host has no IPv6, by build or by sysctl.
const NO_IPV6: [&str; 4] = [
    "IPv6 is disabled",
    "not supported by protocol",
    "Address family not supported",
    "Operation not supported",
];
/// Copies of our rule that are removed before something else is thought to put them back.
const MAX_COPIES: usize = 16;

/// Puts the rule and the route in force for each family that this host has.
pub(super) fn put(host: &Host) -> Result<(), Failure> {
    for (family, name) in FAMILIES {
        let route = ["route", "replace", "local", "default", "dev", "lo", "table", TABLE, "proto", PROTOCOL];
        match host.ip(&with(family, &route))? {
            Ok(_) => {}
            Err(refused) if family == "-6" && is_absent(&refused) => continue,
            Err(refused) if refused.said.contains("device is not up") => {
                return Err(refused
                    .failure("the loopback device of this network namespace is down")
                    .next("ip link set lo up"));
            }
            Err(refused) => return Err(refused.failure(&format!("cannot add a route for {name}"))),
        }
        if has_rule(host, family)? {
            continue;
        }
        let mark = mark();
        match host.ip(&with(family, &rule("add", &mark)))? {
            Ok(_) => {}
            // Somebody put it there meanwhile: that is what was wanted.
            Err(refused) if refused.said.contains("File exists") => {}
            Err(refused) => return Err(refused.failure(&format!("cannot add a routing rule for {name}"))),
        }
    }
    Ok(())
}

/// Removes them; says whether there was anything.
pub(super) fn remove(host: &Host) -> Result<bool, Failure> {
    let mut removed = false;
    for (family, name) in FAMILIES {
        let mark = mark();
        for _ in 0..MAX_COPIES {
            if !has_rule(host, family)? {
                break;
            }
            host.ip(&with(family, &rule("del", &mark)))?
                .map_err(|refused| refused.failure(&format!("cannot remove the routing rule for {name}")))?;
            removed = true;
        }
        if has_route(host, family)? {
            host.ip(&with(family, &["route", "flush", "table", TABLE, "proto", PROTOCOL]))?
                .map_err(|refused| refused.failure(&format!("cannot remove the route for {name}")))?;
            removed = true;
        }
    }
    Ok(removed)
}

/// What is missing although `wanted`, or there although not.
pub(super) fn differences(host: &Host, wanted: bool) -> Result<Vec<String>, Failure> {
    let mut differences = Vec::new();
    for (family, name) in FAMILIES {
        let wanted = wanted && (family == "-4" || has_ipv6(host)?);
        for (is, what) in [(has_rule(host, family)?, "routing rule"), (has_route(host, family)?, "route")] {
            match (is, wanted) {
                (true, false) => differences.push(format!("+ the {what} for {name}, table {TABLE}")),
                (false, true) => differences.push(format!("- the {what} for {name}, table {TABLE}")),
                (true, true) | (false, false) => {}
            }
        }
    }
    Ok(differences)
}

/// One entry of `ip -j rule`, as far as we look.
#[derive(Debug, Deserialize)]
struct Rule {
    #[serde(default)]
    fwmark: String,
    #[serde(default)]
    table: String,
    #[serde(default)]
    protocol: String,
}

fn has_rule(host: &Host, family: &str) -> Result<bool, Failure> {
    let listed = match host.ip(&["-N", "-j", family, "rule", "show"])? {
        Ok(listed) => listed,
        Err(refused) if family == "-6" && is_absent(&refused) => return Ok(false),
        Err(refused) => return Err(refused.failure("cannot list routing rules")),
    };
    let rules: Vec<Rule> = serde_json::from_str(&listed)
        .map_err(|error| Failure::new("cannot read how `ip` lists routing rules").because(&error))?;
    let ours =
        |rule: &Rule| rule.fwmark == format!("{MARK:#x}") && rule.table == TABLE && rule.protocol == PROTOCOL;
    Ok(rules.iter().any(ours))
}

fn has_route(host: &Host, family: &str) -> Result<bool, Failure> {
    match host.ip(&[family, "route", "show", "table", TABLE, "proto", PROTOCOL])? {
        Ok(listed) => Ok(!listed.trim().is_empty()),
        // A table is there from its first route on.
        Err(refused) if refused.said.contains("FIB table does not exist") || is_absent(&refused) => Ok(false),
        Err(refused) => Err(refused.failure("cannot list routes")),
    }
}

/// Whether loopback has an IPv6 address: without, the kernel takes no route over it.
fn has_ipv6(host: &Host) -> Result<bool, Failure> {
    match host.ip(&["-6", "address", "show", "dev", "lo"])? {
        Ok(listed) => Ok(listed.contains("inet6")),
        Err(refused) if is_absent(&refused) => Ok(false),
        Err(refused) => Err(refused.failure("cannot list addresses")),
    }
}

fn is_absent(refused: &Refused) -> bool {
    NO_IPV6.iter().any(|words| refused.said.contains(words))
}

fn mark() -> String {
    format!("{MARK:#x}/{MARK:#x}")
}

fn rule<'a>(verb: &'a str, mark: &'a str) -> [&'a str; 10] {
    ["rule", verb, "fwmark", mark, "lookup", TABLE, "priority", PRIORITY, "protocol", PROTOCOL]
}

fn with<'a>(family: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    std::iter::once(family).chain(rest.iter().copied()).collect()
}
