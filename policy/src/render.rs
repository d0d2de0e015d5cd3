//! An explanation as a person reads it: what `palisade explain RECEIPT` prints.

use std::fmt::Write as _;

use crate::record::{Considered, DecisionRecord, Explanation, Mode, Outcome, PolicyOutcome, RecordedObject};

/// Whether to use colour. It never carries meaning: the text is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// Text alone.
    #[default]
    Plain,
    /// Headings bold, the rest as it is (ANSI).
    Colour,
}

/// Width of the column of names.
const NAME_WIDTH: usize = 14;

/// The record as plain text, ending with a line break.
pub fn render(record: &DecisionRecord) -> String {
    render_with(record, Style::Plain)
}

/// The record as text in a style.
pub fn render_with(record: &DecisionRecord, style: Style) -> String {
    let mut page = Page { text: String::new(), style };
    page.field("receipt", record.receipt.as_str());
    page.field("time", &timestamp(record.time));
    rest(page, record)
}

/// The answer to a question that nobody has asked yet, which has no receipt and no time.
pub fn render_answer(record: &DecisionRecord, style: Style) -> String {
    rest(Page { text: String::new(), style }, record)
}

fn rest(mut page: Page, record: &DecisionRecord) -> String {
    verdict(&mut page, record);
    request(&mut page, record);
    if let Some(explanation) = &record.explanation {
        explained(&mut page, explanation);
    }
    page.text
}

struct Page {
    text: String,
    style: Style,
}

impl Page {
    fn line(&mut self, text: &str) {
        self.text.push_str(text.trim_end());
        self.text.push('\n');
    }

    fn field(&mut self, name: &str, value: &str) {
        let line = format!("{name:NAME_WIDTH$} {}", printable(value));
        self.line(&line);
    }

    fn heading(&mut self, text: &str) {
        self.line("");
        match self.style {
            Style::Plain => self.line(text),
            Style::Colour => self.line(&format!("\u{1b}[1m{text}\u{1b}[0m")),
        }
    }
}

fn verdict(page: &mut Page, record: &DecisionRecord) {
    let verdict = match (record.verdict, record.status, record.mode) {
        (Outcome::Permit, ..) => "permitted".to_owned(),
        (Outcome::Deny, Some(400), _) => "refused (400), not understood".to_owned(),
        (Outcome::Deny, _, Mode::Audit) => "denied, but let through: the service is in audit mode".to_owned(),
        (Outcome::Deny, status, Mode::Enforce) => format!("denied ({})", status.unwrap_or(403)),
    };
    page.field("verdict", &verdict);
    page.field("by", &record.decided_by());
    page.field("rule", &record.rule.to_string());
    let left_out = record.objects.iter().any(|object| object.left_out_by.is_some());
    if record.verdict == Outcome::Deny || left_out {
        page.field("reason", &record.reason);
    }
}

fn named(text: &str) -> &str {
    if text.is_empty() { "none" } else { text }
}

fn request(page: &mut Page, record: &DecisionRecord) {
    page.heading("The request, as understood");
    page.field("  request", &format!("{} {}", record.method, record.target));
    for (name, value) in [("  route", &record.route), ("  action", &record.action)] {
        if let Some(value) = value {
            page.field(name, value);
        }
    }
    for object in &record.objects {
        page.field("  object", &object_line(object));
    }
    let address = record.peer_address.as_ref().map(|a| format!(" from {a}")).unwrap_or_default();
    let caller = record.principal.as_deref().unwrap_or("nobody: no identity was proved");
    page.field("  caller", &format!("{caller}{address}"));
    match &record.user {
        Some(user) => {
            let scopes = if user.scopes.is_empty() { "none".to_owned() } else { user.scopes.join(" ") };
            page.field(
                "  user",
                &format!(
                    "{} of {}, client {}, scopes {scopes}",
                    user.id,
                    named(&user.issuer),
                    named(&user.client)
                ),
            );
        }
        None => page.field("  user", "none"),
    }
    for (i, holder) in record.chain.iter().enumerate() {
        page.field(if i == 0 { "  through" } else { "" }, holder);
    }
    for (name, value) in [
        ("  transaction", &record.transaction),
        ("  trace", &record.trace_id),
        ("  policies", &record.policy_version),
    ] {
        if let Some(value) = value {
            page.field(name, value);
        }
    }
}

fn object_line(object: &RecordedObject) -> String {
    let mut line = object.object.clone();
    for (name, value) in &object.attributes {
        // Writing to a String cannot fail.
        write!(line, "  {name} = {value}").unwrap_or_default();
        if let Some(source) = object.told_by.get(name) {
            write!(line, " ({source})").unwrap_or_default();
        }
    }
    match (object.outcome, &object.left_out_by) {
        (_, Some(rule)) => line + &format!("  (left out: {rule})"),
        (Some(Outcome::Permit), None) => line + "  (permitted)",
        (Some(Outcome::Deny), None) => line + "  (denied)",
        (None, None) => line,
    }
}

fn explained(page: &mut Page, explanation: &Explanation) {
    let of =
        explanation.object.as_ref().map(|object| format!(" for {}", printable(object))).unwrap_or_default();
    page.heading(&format!("Policies considered{of}"));
    for policy in &explanation.considered {
        considered(page, policy);
    }
    if explanation.considered.is_empty() {
        page.line("  none");
    }
    if explanation.omitted > 0 {
        page.line(&format!("  and {} more, further from this request", explanation.omitted));
    }
    page.heading("Nearest rule that would allow");
    match &explanation.nearest {
        None => page.line("  none: no permit is about this action"),
        Some(nearest) => {
            page.line(&format!(
                "  {}  {}:{}",
                printable(&nearest.policy),
                printable(&nearest.file),
                nearest.line
            ));
            let lead = if nearest.missing.is_empty() {
                "its conditions were not reached"
            } else {
                "it would allow if"
            };
            page.line(&format!("  {lead}"));
            for missing in &nearest.missing {
                page.line(&format!("    - {}", printable(missing)));
            }
        }
    }
}

fn considered(page: &mut Page, policy: &Considered) {
    let place = format!("{}:{}", printable(&policy.file), policy.line);
    page.line(&format!("  {} {}  {place}", policy.effect, printable(&policy.policy)));
    match &policy.outcome {
        PolicyOutcome::Scope(mismatches) => {
            // What the request has stands above; only the difference is said here.
            for m in mismatches {
                page.line(&format!("    another {}: it is for {}", m.part, printable(&m.wants)));
            }
        }
        PolicyOutcome::Condition(failed) => {
            page.line(&format!("    does not hold: {}", printable(&failed.clause)));
            for (side, value) in &failed.values {
                page.line(&format!("      {} is {}", printable(side), printable(value)));
            }
        }
        PolicyOutcome::Error { clause, error } => {
            let clause = clause.as_ref().map(|clause| format!("{}: ", printable(clause))).unwrap_or_default();
            page.line(&format!("    failed: {clause}{}", printable(error)));
        }
        PolicyOutcome::Undecided => page.line("    its conditions were not looked at"),
        PolicyOutcome::Satisfied => page.line("    applies"),
    }
}

/// Text from outside without control characters: an explanation must not steer the terminal.
fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || is_invisible(c) { clean.extend(c.escape_default()) } else { clean.push(c) }
    }
    clean
}

/// Characters that reorder or hide text (Unicode TR36 §3.2, bidirectional controls and zero width).
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// UTC, as RFC 3339 writes it, from milliseconds since the Unix epoch.
fn timestamp(milliseconds: u64) -> String {
    let time = i128::from(milliseconds).saturating_mul(1_000_000);
    let formatted = time::OffsetDateTime::from_unix_timestamp_nanos(time)
        .ok()
        .and_then(|time| time.format(&time::format_description::well_known::Rfc3339).ok());
    formatted.unwrap_or_else(|| format!("{milliseconds} ms"))
}
