//! `palisade explain`: the request as it was understood, every policy that was considered, and what came nearest to
//! allowing it. Of a decision that was made, by its receipt; or of a request that nobody has made yet, by the policies
//! as they are on disk: the same engine decides.

use std::collections::BTreeMap;

use ca::model::{DecisionQuery, StoredDecision};
use identity::txn::User;
use identity::{Clock as _, SpiffeId, SystemClock};
use policy::{
    AskedBody, DecisionRecord, Mode, Outcome, Question, Receipt, Style, render_answer, render_with,
};

use crate::Global;
use crate::cmd::{admin, config};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::workload;

/// Newest decisions looked through for others of the same transaction: it lives 30 seconds.
const NEAR: usize = 500;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The receipt that the denied caller was given; or a request that nobody has made yet: who calls (a service of
    /// mesh.toml or a SPIFFE ID), which service, the method and the target, such as: web accounts GET /accounts/17.
    #[arg(required = true, num_args = 1..=4, value_names = ["RECEIPT or CALLER", "SERVICE", "METHOD", "TARGET"])]
    words: Vec<String>,
    #[command(flatten)]
    asked: Asked,
    /// Print the whole record as JSON.
    #[arg(long)]
    json: bool,
}

/// What else there is to a request that nobody has made yet.
#[derive(Debug, clap::Args)]
struct Asked {
    /// On whose behalf. Default: nobody's.
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// A group of the user's; may be given several times.
    #[arg(long = "group", value_name = "NAME", requires = "user")]
    groups: Vec<String>,
    /// A scope that the user's client has; may be given several times.
    #[arg(long = "scope", value_name = "NAME", requires = "user")]
    scopes: Vec<String>,
    /// What the app would tell of the request's objects, such as owner=bob; JSON, or text as it is.
    #[arg(long = "attribute", value_name = "NAME=VALUE")]
    attributes: Vec<String>,
    /// A header of the request; may be given several times.
    #[arg(long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The request's body.
    #[arg(long, value_name = "TEXT")]
    body: Option<String>,
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    match args.words.as_slice() {
        [receipt] => decided(receipt, args.json, global, printer),
        [caller, service, method, target] => {
            asked([caller, service, method, target], &args.asked, args.json, global, printer)
        }
        _ => Err(Failure::usage("either a receipt, or a caller, a service, a method and a target")
            .hint("palisade explain web accounts GET /accounts/17 --user alice")),
    }
}

/// A request that nobody has made yet.
fn asked(
    [caller, service, method, target]: [&String; 4],
    asked: &Asked,
    json: bool,
    global: &Global,
    printer: &Printer,
) -> Result<Exit, Failure> {
    let mesh = config::load(&global.config)?;
    let policy = workload::policy(&mesh, mesh.policies_of(service))?.with_mode(Mode::Enforce);
    let registered = mesh.registrations();
    let known = registered.iter().find(|known| known.name == *caller).map(|known| known.id.clone());
    let id = known.or_else(|| SpiffeId::new(caller).ok()).ok_or_else(|| {
        let names = registered.iter().map(|known| known.name.as_str());
        Failure::usage(format!("`{caller}` is no workload of mesh.toml and no SPIFFE ID")).hint(
            policy::suggest(caller, names)
                .unwrap_or_else(|| "its services and workloads may be named".to_owned()),
        )
    })?;
    let issuer =
        mesh.gateway.as_ref().map_or_else(String::new, |gateway| crate::mesh::check::origin(&gateway.issuer));
    let user = asked.user.clone().map(|id| User {
        id,
        issuer,
        client: mesh.gateway.as_ref().map_or_else(String::new, |gateway| gateway.client_id.clone()),
        scopes: asked.scopes.clone(),
        groups: asked.groups.clone(),
        auth_time: SystemClock.now().as_secs(),
        tenant: None,
        mfa: false,
    });
    let pair = |text: &String, separator: char, form: &str| {
        let pair =
            text.split_once(separator).map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()));
        pair.ok_or_else(|| Failure::usage(format!("`{text}` is not {form}")))
    };
    let attribute = |text: &String| {
        let (name, value) = pair(text, '=', "an attribute, such as owner=bob")?;
        Ok((name, serde_json::from_str(&value).unwrap_or(serde_json::Value::String(value))))
    };
    let question = Question {
        caller: id,
        user,
        method: method.clone(),
        target: target.clone(),
        headers: asked
            .headers
            .iter()
            .map(|text| pair(text, ':', "a header, such as accept: text/html"))
            .collect::<Result<_, _>>()?,
        body: asked.body.clone().map(AskedBody::Text),
        attributes: asked.attributes.iter().map(attribute).collect::<Result<_, Failure>>()?,
        objects: BTreeMap::new(),
        now: SystemClock.now(),
    };
    let record =
        question.ask(&policy).map_err(|why| Failure::usage(format!("this cannot be asked: {why}")))?;
    if json {
        printer.data(&format!("{:#}\n", serde_json::json!({"version": 1, "decision": record})))?;
    } else {
        let style = if printer.colours_data() { Style::Colour } else { Style::Plain };
        printer.data(&render_answer(&record, style))?;
    }
    if record.reason.ends_with(" is not known") {
        printer.progress("what the app would tell is said by --attribute NAME=VALUE");
    }
    Ok(Exit::Ok)
}

/// A decision that was made.
fn decided(receipt: &str, json: bool, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let receipt: Receipt = receipt.parse().map_err(|error| {
        Failure::usage(format!("`{receipt}` is not a receipt"))
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
    if json {
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
