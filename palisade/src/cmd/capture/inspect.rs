//! What is in force, and how it differs from what should be.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::host::Host;
use super::routing;
use super::ruleset::{self, MARKER, TABLE, WRITTEN_BY};
use super::settings::Plan;
use crate::failure::Failure;

/// What there is under our table's name.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing.
    Nothing,
    /// A table that somebody else made.
    Foreign,
    /// Ours.
    Ours(InForce),
}

/// Rules that `on` wrote.
#[derive(Debug)]
pub(super) struct InForce {
    /// The options `on` was given.
    pub(super) words: Vec<String>,
    /// What is there and should not be (+), and the other way round (-).
    pub(super) differences: Vec<String>,
    /// Connections by what became of them, since the rules were written.
    pub(super) connections: BTreeMap<String, u64>,
}

/// Whose the table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is none.
    Nobody,
    /// Ours to change.
    Ours,
    /// Not ours.
    Foreign,
}

/// What is in force, compared with `expected` or, without, with what it was written as.
pub(super) fn inspect(host: &Host, expected: Option<&Plan>) -> Result<Found, Failure> {
    let Some(rules) = table(host)? else { return Ok(Found::Nothing) };
    let Some(words) = words(&rules) else { return Ok(Found::Foreign) };
    let connections =
        rules.iter().filter_map(Rule::counted).fold(BTreeMap::new(), |mut sums, (what, count)| {
            *sums.entry(what).or_insert(0) += count;
            sums
        });
    let differences = match expected.map(|plan| Ok(plan.clone())).unwrap_or_else(|| Plan::read(&words)) {
        Ok(plan) => differences(host, &plan)?,
        Err(failure) => vec![format!("? {}", failure.message)],
    };
    Ok(Found::Ours(InForce { words, differences, connections }))
}

/// Whose the table is.
pub(super) fn owner(host: &Host) -> Result<Owner, Failure> {
    Ok(match table(host)? {
        None => Owner::Nobody,
        Some(rules) if words(&rules).is_some() => Owner::Ours,
        Some(_) => Owner::Foreign,
    })
}

fn differences(host: &Host, plan: &Plan) -> Result<Vec<String>, Failure> {
    let expected = host
        .listing_of(&ruleset::render(plan), TABLE)?
        .map_err(|refused| refused.failure("cannot load the rules aside to compare with them"));
    let mut differences = match expected {
        Ok(expected) => {
            let is = host
                .nft(&["-s", "list", "table", "inet", TABLE], "")?
                .map_err(|refused| refused.failure("cannot list the capture rules"))?;
            compare(&is, &expected)
        }
        // What cannot be compared is not said to be the same.
        Err(failure) => vec![format!("? {}: {}", failure.message, failure.causes.join(": "))],
    };
    differences.extend(routing::differences(host, plan.inbound_port.is_some())?);
    Ok(differences)
}

/// Lines of one listing that the other lacks. The same lines in another order are a difference too: a rule
/// that passes something works only before the one that captures it.
fn compare(is: &str, expected: &str) -> Vec<String> {
    let lines = |text: &str| -> Vec<String> { text.lines().map(|line| line.trim().to_owned()).collect() };
    let (is, expected) = (lines(is), lines(expected));
    if is == expected {
        return Vec::new();
    }
    let lacks = |these: &[String], those: &[String], sign: char| -> Vec<String> {
        let mut left: Vec<&String> = those.iter().collect();
        let mut lacking = Vec::new();
        for line in these {
            match left.iter().position(|other| *other == line) {
                Some(found) => drop(left.swap_remove(found)),
                None => lacking.push(format!("{sign} {line}")),
            }
        }
        lacking
    };
    let mut differences = lacks(&is, &expected, '+');
    differences.extend(lacks(&expected, &is, '-'));
    if differences.is_empty() {
        differences.push("? the rules are in another order".to_owned());
    }
    differences
}

/// What `nft -j` lists, as far as we look.
#[derive(Debug, Deserialize)]
struct Listing {
    nftables: Vec<Object>,
}

#[derive(Debug, Deserialize)]
struct Object {
    table: Option<Table>,
    rule: Option<Rule>,
}

#[derive(Debug, Deserialize)]
struct Table {
    family: String,
    name: String,
}

#[derive(Debug, Deserialize)]
struct Rule {
    chain: String,
    comment: Option<String>,
    #[serde(default)]
    expr: Vec<Expression>,
}

#[derive(Debug, Deserialize)]
struct Expression {
    counter: Option<Counter>,
}

#[derive(Debug, Deserialize)]
struct Counter {
    packets: u64,
}

impl Rule {
    /// What it counts and how many there were.
    fn counted(&self) -> Option<(String, u64)> {
        let counter = self.expr.iter().find_map(|expression| expression.counter.as_ref())?;
        Some((self.comment.clone()?, counter.packets))
    }
}

/// The rules of the table of our name, whosever it is.
fn table(host: &Host) -> Result<Option<Vec<Rule>>, Failure> {
    let tables = list(host, &["-j", "list", "tables"])?;
    let is_it = |table: Table| table.family == "inet" && table.name == TABLE;
    if !tables.into_iter().filter_map(|object| object.table).any(is_it) {
        return Ok(None);
    }
    let objects = list(host, &["-j", "list", "table", "inet", TABLE])?;
    Ok(Some(objects.into_iter().filter_map(|object| object.rule).collect()))
}

fn list(host: &Host, args: &[&str]) -> Result<Vec<Object>, Failure> {
    let listed = host
        .nft(args, "")?
        .map_err(|refused| refused.failure("cannot list the rules of this network namespace"))?;
    // Older versions print nothing where there is nothing.
    if listed.trim().is_empty() {
        return Ok(Vec::new());
    }
    let listing: Listing = serde_json::from_str(&listed)
        .map_err(|error| Failure::new("cannot read how `nft` lists rules").because(&error))?;
    Ok(listing.nftables)
}

/// The options in the comments, if the table is ours.
fn words(rules: &[Rule]) -> Option<Vec<String>> {
    let mut comments = rules.iter().filter(|rule| rule.chain == WRITTEN_BY).map(|rule| rule.comment.clone());
    (comments.next()?.as_deref() == Some(MARKER)).then(|| comments.flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_are_compared_line_by_line_and_in_order() {
        assert_eq!(compare("a\n\tb\n", "a\n  b\n"), [] as [&str; 0]);
        assert_eq!(compare("a\nx\nb\n", "a\nb\nb\n"), ["+ x", "- b"]);
        assert_eq!(compare("b\na\n", "a\nb\n"), ["? the rules are in another order"]);
    }

    #[test]
    fn a_table_is_ours_by_the_comment_of_its_first_rule() {
        let rule = |chain: &str, comment: &str| Rule {
            chain: chain.to_owned(),
            comment: Some(comment.to_owned()),
            expr: Vec::new(),
        };
        assert_eq!(words(&[]), None);
        assert_eq!(words(&[rule("input", MARKER)]), None);
        assert_eq!(words(&[rule(WRITTEN_BY, "somebody else")]), None);
        let ours = [rule(WRITTEN_BY, MARKER), rule(WRITTEN_BY, "--uid 990"), rule("outbound", "counted")];
        assert_eq!(words(&ours).unwrap(), ["--uid 990"]);
    }
}
