//! What the pages say.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::model::{
    DecisionDetail, DecisionRow, HolderRow, IdentityRow, NodeRow, Overview, PoliciesRow, Verdict,
};
use crate::when;
use crate::wrong::{self, Finding, Severity};

/// More would push everything else off the first screen; the rest is in the lists.
const FINDINGS_SHOWN_MAX: usize = 8;
/// The overview's taste of what is being decided.
const RECENT_SHOWN_MAX: usize = 6;

/// Which decisions to show.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    verdict: Option<Verdict>,
    words: String,
}

impl Filter {
    pub(crate) fn new(verdict: &str, words: String) -> Self {
        let verdict = match verdict {
            "denied" => Some(Verdict::Denied),
            "allowed" => Some(Verdict::Allowed),
            _ => None,
        };
        Self { verdict, words }
    }

    fn matches(&self, row: &DecisionRow) -> bool {
        self.verdict.is_none_or(|verdict| verdict == row.verdict)
            && self.words.split_whitespace().all(|word| holds(row, &word.to_lowercase()))
    }

    fn query(&self, verdict: Option<Verdict>) -> String {
        let name = match verdict {
            Some(Verdict::Denied) => "denied",
            Some(Verdict::Allowed) => "allowed",
            None => "",
        };
        format!("?verdict={name}&q={}", percent_encoded(&self.words))
    }
}

fn holds(row: &DecisionRow, word: &str) -> bool {
    let texts = [&row.receipt, &row.service, &row.principal, &row.action, &row.reason];
    texts
        .into_iter()
        .chain(row.user.as_ref())
        .chain(row.rule.as_ref())
        .chain(&row.objects)
        .any(|text| text.to_lowercase().contains(word))
}

/// For a query's value: everything but unreserved characters (RFC 3986, section 2.3) is escaped.
fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tab {
    Overview,
    Decisions,
    None,
}

fn page(title: &str, tab: Tab, live: Option<&str>, content: &Markup) -> Markup {
    let link = |this: Tab, path: &str, name: &str| {
        html! { a href=(path) aria-current=[(this == tab).then_some("page")] { (name) } }
    };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · Palisade" }
                link rel="stylesheet" href="/assets/console.css";
                link rel="icon" type="image/svg+xml" href="/assets/icon.svg";
                script src="/assets/console.js" defer {}
            }
            body {
                a .skip href="#content" { "Skip to the content" }
                header .bar {
                    a .brand href="/" { (mark()) "Palisade" }
                    @if tab != Tab::None || live.is_some() {
                        nav aria-label="Pages" {
                            (link(Tab::Overview, "/", "Overview"))
                            (link(Tab::Decisions, "/decisions", "Decisions"))
                        }
                    }
                    @if live.is_some() {
                        // Shown by the script: without it a page is as of when it was loaded.
                        div .live hidden {
                            span .state role="status" { "Connecting" }
                            button type="button" .pause aria-pressed="false" { "Pause" }
                        }
                    }
                }
                main #content data-live=[live] { (content) }
            }
        }
    }
}

/// Five stakes of a fence.
fn mark() -> Markup {
    PreEscaped(
        r#"<svg viewBox="0 0 24 24" width="24" height="24" aria-hidden="true"><path d="M2 22V8l2-3 2 3v14zM7.300 22V6l2-3 2 3v16zM12.700 22V6l2-3 2 3v16zM18 22V8l2-3 2 3v14z"/><path d="M1 13h22v2.500H1z"/></svg>"#
            .to_owned(),
    )
}

pub(crate) fn overview(fragment: &Markup) -> Markup {
    page("Overview", Tab::Overview, Some("/live/overview"), fragment)
}

pub(crate) fn overview_fragment(overview: &Overview, recent: &[DecisionRow], now: u64) -> Markup {
    let findings = wrong::findings(overview, recent, now);
    html! {
        h1 { "Trust domain " span .id { (overview.trust_domain) } }
        (findings_section(&findings))
        dl .figures {
            div { dt { "Identities" } dd { (overview.identities.len()) } }
            div { dt { "Nodes" } dd { (overview.nodes.len()) } }
            div { dt { "Allowed" } dd { (grouped(overview.allowed)) } }
            div .hot[overview.denied > 0] { dt { "Denied" } dd { (grouped(overview.denied)) } }
            div { dt { "Authority ends" } dd .words { (when::relative(overview.authority_expires, now)) } }
        }
        section aria-labelledby="recent" {
            div .head {
                h2 #recent { "Latest decisions" }
                a href="/decisions" { "All decisions" }
            }
            (decision_table(recent.iter().take(RECENT_SHOWN_MAX), now))
        }
        @if let Some(policies) = &overview.policies {
            section aria-labelledby="policies" {
                h2 #policies { "Policies" }
                (policies_part(policies, now))
            }
        }
        section aria-labelledby="identities" {
            h2 #identities { "Identities" }
            (identity_table(&overview.identities, &overview.trust_domain, now))
        }
        section aria-labelledby="nodes" {
            h2 #nodes { "Nodes" }
            (node_table(&overview.nodes, &overview.trust_domain, now))
        }
    }
}

fn findings_section(findings: &[Finding]) -> Markup {
    html! {
        section .findings aria-labelledby="wrong" {
            @if findings.is_empty() {
                h2 #wrong .well { (tick()) "Nothing is wrong" }
            } @else {
                h2 #wrong { (findings.len()) @if findings.len() == 1 { " thing to look at" } @else { " things to look at" } }
                ul {
                    @for finding in findings.iter().take(FINDINGS_SHOWN_MAX) {
                        li .broken[finding.severity == Severity::Broken] {
                            span .sign aria-hidden="true" { "!" }
                            div {
                                p .what {
                                    @if finding.severity == Severity::Broken { span .visually-hidden { "Broken: " } }
                                    @match &finding.link {
                                        Some(link) => a href=(link) { (finding.what) },
                                        None => (finding.what),
                                    }
                                }
                                p .next { (finding.next) }
                            }
                        }
                    }
                }
                @if findings.len() > FINDINGS_SHOWN_MAX {
                    p .more { "and " (findings.len() - FINDINGS_SHOWN_MAX) " more in the lists below" }
                }
            }
        }
    }
}

fn tick() -> Markup {
    PreEscaped(
        r#"<svg viewBox="0 0 16 16" width="18" height="18" aria-hidden="true"><path d="M3 8.500 6.500 12 13 4.500" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round" stroke-linejoin="round"/></svg>"#
            .to_owned(),
    )
}

fn identity_table(rows: &[IdentityRow], trust_domain: &str, now: u64) -> Markup {
    let mut rows: Vec<&IdentityRow> = rows.iter().collect();
    // What ends first is what goes wrong first.
    rows.sort_by(|a, b| (a.expires, &a.spiffe_id).cmp(&(b.expires, &b.spiffe_id)));
    html! {
        @if rows.is_empty() {
            p .none { "No identity has been issued yet." }
        } @else {
            table {
                thead { tr { th scope="col" { "SPIFFE ID" } th scope="col" { "Expires" } th scope="col" { "Why it has it" } th scope="col" { "Serial" } } }
                tbody {
                    @for row in rows {
                        tr {
                            th scope="row" data-label="SPIFFE ID" { (spiffe_id(&row.spiffe_id, trust_domain)) }
                            td data-label="Expires" {
                                @if row.expires <= now { span .verdict.denied { "Expired" } " " }
                                (when::relative(row.expires, now))
                            }
                            td data-label="Why" .why { (row.why) }
                            td data-label="Serial" { span .id.serial title=(row.serial) { (row.serial) } }
                        }
                    }
                }
            }
        }
    }
}

/// What git shows of a commit.
fn commit(hash: &str) -> Markup {
    let short: String = hash.chars().take(12).collect();
    html! { span .id title=(hash) { (short) } }
}

fn policies_part(policies: &PoliciesRow, now: u64) -> Markup {
    let mut holders: Vec<&HolderRow> = policies.holders.iter().collect();
    holders.sort_by(|a, b| (&a.service, &a.host, &a.name).cmp(&(&b.service, &b.host, &b.name)));
    html! {
        p .more {
            @match &policies.in_force {
                Some((hash, since)) => { "In force: " (commit(hash)) ", put out " (when::relative(*since, now)) },
                None => "None is in force yet.",
            }
            @if let Some((hash, ring)) = &policies.rolling {
                "; on its way: " (commit(hash)) ", ring " (ring)
            }
        }
        @if !holders.is_empty() {
            table {
                thead { tr { th scope="col" { "Service" } th scope="col" { "Host" } th scope="col" { "Who" } th scope="col" { "Has" } th scope="col" { "Is" } } }
                tbody {
                    @for holder in holders {
                        tr {
                            th scope="row" data-label="Service" { (holder.service) }
                            td data-label="Host" { (holder.host) }
                            td data-label="Who" { span .id { (holder.name) } }
                            td data-label="Has" {
                                @match &holder.commit {
                                    Some(hash) => (commit(hash)),
                                    None if holder.has_some => "policies of another time",
                                    None => { span .verdict.denied { "None" } " everything is denied" },
                                }
                            }
                            td data-label="Is" .why {
                                @if let Some(refused) = &holder.refused { "refuses " (refused) }
                                @else if holder.as_wanted { "as it should be" }
                                @else { "about to change" }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn node_table(rows: &[NodeRow], trust_domain: &str, now: u64) -> Markup {
    html! {
        @if rows.is_empty() {
            p .none { "No node has joined yet." }
        } @else {
            table {
                thead { tr { th scope="col" { "Host" } th scope="col" { "SPIFFE ID" } th scope="col" { "Last seen" } } }
                tbody {
                    @for row in rows {
                        tr {
                            th scope="row" data-label="Host" { (row.host) }
                            td data-label="SPIFFE ID" { (spiffe_id(&row.spiffe_id, trust_domain)) }
                            td data-label="Last seen" { (when::relative(row.last_seen, now)) }
                        }
                    }
                }
            }
        }
    }
}

/// The own trust domain in quiet, the path in full; another's trust domain stands out.
fn spiffe_id(id: &str, trust_domain: &str) -> Markup {
    let own = format!("spiffe://{trust_domain}");
    html! {
        span .id {
            @match id.strip_prefix(&own).filter(|path| path.starts_with('/')) {
                Some(path) => { span .quiet { (own) } wbr; (path) },
                None => (id),
            }
        }
    }
}

pub(crate) fn decisions(fragment: &Markup, filter: &Filter) -> Markup {
    let live = format!("/live/decisions{}", filter.query(filter.verdict));
    page("Decisions", Tab::Decisions, Some(&live), fragment)
}

pub(crate) fn decisions_fragment(rows: &[DecisionRow], filter: &Filter, now: u64) -> Markup {
    let shown: Vec<&DecisionRow> = rows.iter().filter(|row| filter.matches(row)).collect();
    let choice = |verdict: Option<Verdict>, name: &str| {
        html! {
            a href={ "/decisions" (filter.query(verdict)) }
                aria-current=[(filter.verdict == verdict).then_some("true")] { (name) }
        }
    };
    html! {
        h1 { "Decisions" }
        div .filter {
            nav .choices aria-label="Verdict" {
                (choice(None, "All"))
                (choice(Some(Verdict::Denied), "Denied"))
                (choice(Some(Verdict::Allowed), "Allowed"))
            }
            form action="/decisions" method="get" role="search" {
                @if let Some(verdict) = filter.verdict {
                    input type="hidden" name="verdict" value=(if verdict == Verdict::Denied { "denied" } else { "allowed" });
                }
                label for="q" .visually-hidden { "Search decisions" }
                input #q type="search" name="q" value=(filter.words) placeholder="User, service, object, receipt";
                button type="submit" { "Search" }
            }
        }
        @if shown.is_empty() {
            @if rows.is_empty() {
                p .none { "Nothing has been decided yet. Decisions show here as requests come." }
            } @else {
                p .none { "None of the newest " (rows.len()) " decisions matches. " a href="/decisions" { "Show all" } }
            }
        } @else {
            (decision_table(shown.iter().copied(), now))
            p .more { (shown.len()) " of the newest " (rows.len()) ", newest first" }
        }
    }
}

fn decision_table<'a>(rows: impl Iterator<Item = &'a DecisionRow>, now: u64) -> Markup {
    let mut rows = rows.peekable();
    html! {
        @if rows.peek().is_none() {
            p .none { "Nothing has been decided yet." }
        } @else {
            table .decisions {
                thead { tr {
                    th scope="col" { "Verdict" } th scope="col" { "Action and objects" } th scope="col" { "Who asked" }
                    th scope="col" { "Where" } th scope="col" { "Why" } th scope="col" { "When" }
                } }
                tbody {
                    @for row in rows {
                        tr {
                            td data-label="Verdict" { (verdict(row.verdict)) }
                            th scope="row" data-label="What" {
                                a href={ "/decisions/" (percent_encoded(&row.receipt)) } data-key=(row.receipt) { (row.action) }
                                @for object in &row.objects { " " span .id.object { (object) } }
                            }
                            td data-label="Who" {
                                @if let Some(user) = &row.user { strong { (user) } " through " }
                                span .id title=(row.principal) { (short_principal(&row.principal)) }
                            }
                            td data-label="Where" { (row.service) }
                            td data-label="Why" .why {
                                (row.reason)
                                @if let Some(rule) = &row.rule { " " span .id.quiet { (rule) } }
                            }
                            td data-label="When" .when { (when::relative(row.time_ms / 1_000, now)) }
                        }
                    }
                }
            }
        }
    }
}

/// In a list the path of a SPIFFE ID says enough; its title and the decision's page have all of it.
fn short_principal(principal: &str) -> &str {
    principal
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.split_once('/'))
        .map_or(principal, |(_, path)| path)
}

fn verdict(verdict: Verdict) -> Markup {
    match verdict {
        Verdict::Allowed => html! { span .verdict.allowed { "Allowed" } },
        Verdict::Denied => html! { span .verdict.denied { "Denied" } },
    }
}

pub(crate) fn decision(detail: &DecisionDetail) -> Markup {
    let DecisionDetail { row, text } = detail;
    let command = format!("palisade explain {}", row.receipt);
    let content = html! {
        p .crumb { a href="/decisions" { "Decisions" } }
        h1 { (verdict(row.verdict)) " " (row.action) @for object in &row.objects { " " span .id.object { (object) } } }
        p .lead { (row.reason) }
        dl .facts {
            div { dt { "For" } dd { @match &row.user { Some(user) => (user), None => "nobody: a call without a user" } } }
            div { dt { "Asked by" } dd .id { (row.principal) } }
            div { dt { "Decided at" } dd { (row.service) } }
            div { dt { "Rule" } dd { @match &row.rule { Some(rule) => span .id { (rule) }, None => "none: nothing allowed it" } } }
            div { dt { "Time" } dd { (when::full(row.time_ms / 1_000)) } }
            div { dt { "Receipt" } dd .id { (row.receipt) } }
        }
        section aria-labelledby="explanation" {
            div .head {
                h2 #explanation { "Explanation" }
                div .copy {
                    code { (command) }
                    button type="button" data-copy=(command) hidden { "Copy as command" }
                }
            }
            pre tabindex="0" { (text) }
        }
    };
    page(&format!("{} {}", row.action, row.receipt), Tab::Decisions, None, &content)
}

pub(crate) fn no_link() -> Markup {
    let content = html! {
        h1 { "This console opens by its link" }
        p .lead {
            "The link holds a token, once. It was printed where the mesh was started, in the last lines of "
            code { "palisade demo" } ", and is in the file given to " code { "--ready" } " as " code { "console" } "."
        }
        p { "It looks like " code { "http://127.0.0.1:PORT/?token=…" } ". A mesh with a new token needs its new link." }
    };
    page("Link needed", Tab::None, None, &content)
}

pub(crate) fn problem(what: &str, more: &str) -> Markup {
    let content = html! {
        h1 { (what) }
        @if !more.is_empty() { p .lead { (more) } }
        p { a href="/" { "To the overview" } }
    };
    page(what, Tab::None, None, &content)
}

/// `12 345`, the digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
    }

    #[test]
    fn a_filter_stays_in_its_links() {
        let filter = Filter::new("denied", "alice & \"42\"".to_owned());
        assert_eq!(filter.query(filter.verdict), "?verdict=denied&q=alice%20%26%20%2242%22");
        assert_eq!(filter.query(None), "?verdict=&q=alice%20%26%20%2242%22");
    }

    #[test]
    fn principals_are_shortened_only_where_nothing_is_lost() {
        assert_eq!(short_principal("spiffe://bank.example/service/web"), "service/web");
        assert_eq!(short_principal("bank-cli"), "bank-cli");
        assert_eq!(short_principal("spiffe://bank.example"), "spiffe://bank.example");
    }
}
