//! `palisade explain RECEIPT`: the request as it was understood, every policy that was considered, and
//! what came nearest to allowing it.

use ca::model::StoredDecision;
use policy::{DecisionRecord, Receipt, Style, render_with};

use crate::Global;
use crate::cmd::admin;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

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
    let stored = admin::ask(global, async |client| client.decision(&receipt.to_string()).await)?;
    let Some(stored) = stored else {
        return Err(Failure::new(format!("control has no decision {receipt}"))
            .hint("decisions arrive within a second or so; the oldest are dropped when the store is full"));
    };
    if args.json {
        printer.data(&format!("{:#}\n", serde_json::json!({"version": 1, "decision": stored})))?;
    } else {
        let style = if printer.colours_data() { Style::Colour } else { Style::Plain };
        printer.data(&text(&stored, style)?)?;
    }
    Ok(Exit::Ok)
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
