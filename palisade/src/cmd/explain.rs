//! `palisade explain RECEIPT`: the request as it was understood, every policy that was considered, and
//! what came nearest to allowing it.

use ca::model::{DecisionQuery, StoredDecision};
use policy::{DecisionRecord, Outcome, Receipt, Style, render_with};

use crate::Global;
use crate::cmd::admin;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

/// Newest decisions looked through for others of the same transaction: it lives 30 seconds.
const NEAR: usize = 500;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The receipt that the denied caller was given.
    receipt: String,
    /// Print the whole record as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let receipt: Receipt = args.receipt.parse().map_err(|error| {
        Failure::usage(format!("`{}` is not a receipt", args.receipt))
            .because(&error)
            .hint("a denied caller finds it in the body of its 403, as \"receipt\"")
    })?;
    let found = admin::ask(global, async |client| {
        let Some(stored) = client.decision(&receipt.to_string()).await? else { return Ok(None) };
        let others =
            client.decisions(&DecisionQuery { limit: Some(NEAR), ..DecisionQuery::default() }).await?;
        Ok(Some((stored, others)))
    })?;
    let Some((stored, others)) = found else {
        return Err(Failure::new(format!("control has no decision {receipt}"))
            .hint("decisions arrive within a second or so; the oldest are dropped when the store is full"));
    };
    if args.json {
        printer.data(&format!("{:#}\n", serde_json::json!({"version": 1, "decision": stored})))?;
    } else {
        let style = if printer.colours_data() { Style::Colour } else { Style::Plain };
        printer.data(&text(&stored, style)?)?;
        printer.data(&elsewhere(&stored, &others))?;
    }
    Ok(Exit::Ok)
}

/// What else was denied in the same transaction. A service that was refused by the next one has nothing
/// to show, so the first receipt often only points here.
fn elsewhere(stored: &StoredDecision, others: &[StoredDecision]) -> String {
    let record = |stored: &StoredDecision| serde_json::from_value::<DecisionRecord>(stored.json.clone()).ok();
    let Some(transaction) = record(stored).and_then(|record| record.transaction) else {
        return String::new();
    };
    let lines: Vec<String> = others
        .iter()
        .filter(|other| other.receipt != stored.receipt)
        .filter_map(record)
        .filter(|other| other.transaction.as_ref() == Some(&transaction) && other.verdict == Outcome::Deny)
        .map(|other| format!("  {}  {}: {}\n", other.receipt, other.decided_by(), other.reason))
        .collect();
    if lines.is_empty() {
        return String::new();
    }
    format!("\nalso denied in this transaction (explain it by its receipt)\n{}", lines.concat())
}

/// The explanation as text, with who reported it: a workload can speak for itself only.
pub(crate) fn text(stored: &StoredDecision, style: Style) -> Result<String, Failure> {
    let record: DecisionRecord = serde_json::from_value(stored.json.clone())
        .map_err(|error| Failure::new("the decision was recorded by another version").because(&error))?;
    Ok(format!(
        "{}\nreported by    {} on {}\n",
        render_with(&record, style).trim_end(),
        stored.reporter,
        stored.host
    ))
}
