//! The pages.

use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use hyper::StatusCode;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde::Deserialize;
use time::OffsetDateTime;
use time::macros::format_description;

use super::{Bank, Person, fresh_key, money};
use crate::call::{Answer, CallError, Trace};
use crate::wire::{Account, AccountId, AccountList, Direction, Entry, History, Refusal};

/// `GET /`: the person's accounts.
pub(super) async fn accounts(
    State(bank): State<Bank>,
    person: Result<Person, Refusal>,
    trace: Trace,
) -> Response {
    let owner = match person {
        Ok(Person(owner)) => owner,
        Err(refusal) => return Problem::from(refusal).page(""),
    };
    match load::<AccountList>(&bank, &format!("/owners/{owner}/accounts"), &trace).await {
        Ok(list) => accounts_page(&list).into_response(),
        Err(problem) => problem.page(owner.as_str()),
    }
}

/// `GET /accounts/{id}`: one account, its history and the transfer form.
pub(super) async fn account(
    State(bank): State<Bank>,
    Path(id): Path<String>,
    person: Result<Person, Refusal>,
    trace: Trace,
) -> Response {
    let viewer = person.map(|Person(owner)| String::from(owner)).unwrap_or_default();
    match one_account(&bank, id, &trace, &viewer).await {
        Ok(page) => page.into_response(),
        Err(problem) => problem.page(&viewer),
    }
}

async fn one_account(bank: &Bank, id: String, trace: &Trace, viewer: &str) -> Result<Markup, Problem> {
    let id = AccountId::try_from(id).map_err(|_| Problem::not_found())?;
    let (account_path, history_path) = (format!("/accounts/{id}"), format!("/accounts/{id}/history"));
    let (account, history) = tokio::join!(
        load::<Account>(bank, &account_path, trace),
        load::<History>(bank, &history_path, trace)
    );
    Ok(account_page(&account?, &history?, &fresh_key()?, viewer))
}

/// Everything else.
pub(super) async fn not_found() -> Response {
    Problem::not_found().page("")
}

async fn load<T: serde::de::DeserializeOwned>(bank: &Bank, path: &str, trace: &Trace) -> Result<T, Problem> {
    let answer = bank.accounts.get(path, trace).await.map_err(Refusal::from)?;
    if answer.status.is_success() {
        Ok(answer.json().map_err(|error: CallError| Refusal::internal(&error))?)
    } else {
        Err(Problem::from(answer))
    }
}

/// Why there is no page to show, as a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    status: StatusCode,
    title: &'static str,
    words: String,
    /// The receipt of the decision that refused, if one did.
    receipt: Option<String>,
}

/// The errors of the services, and of the sidecars in front of them, as far as a page is made of them.
#[derive(Debug, Default, Deserialize)]
struct ErrorBody {
    #[serde(default)]
    error: String,
    receipt: Option<String>,
}

impl Problem {
    /// A mistake in the form.
    pub(super) fn words(status: StatusCode, words: impl Into<String>) -> Self {
        Self { status, title: "Please check the form", words: words.into(), receipt: None }
    }

    fn not_found() -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            title: "There is no such page",
            words: "The address may be mistyped.".to_owned(),
            receipt: None,
        }
    }

    /// The page, with the person's name in its head.
    pub(super) fn page(&self, viewer: &str) -> Response {
        let content = html! {
            div .problem {
                h1 { (self.title) }
                p .lead { (self.words) }
                @if let Some(receipt) = &self.receipt {
                    div .receipt {
                        p { "Receipt " code { (receipt) } }
                        p .hint { "Whoever runs the mesh can see why:" }
                        pre { "palisade explain " span .whole { (receipt) } }
                    }
                }
                p { a .button href="/" { "To my accounts" } }
            }
        };
        (self.status, page(self.title, viewer, &content)).into_response()
    }
}

impl From<Answer> for Problem {
    fn from(answer: Answer) -> Self {
        let body: ErrorBody = answer.json().unwrap_or_default();
        let (title, words) = explained(answer.status, &body.error);
        Self { status: answer.status, title, words: words.to_owned(), receipt: body.receipt }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let (title, words) = explained(refusal.status, refusal.code);
        Self { status: refusal.status, title, words: words.to_owned(), receipt: None }
    }
}

/// Title and words for the errors that a person can meet.
fn explained(status: StatusCode, error: &str) -> (&'static str, &'static str) {
    match (status, error) {
        (_, "insufficient_funds") => ("Not enough on the account", "The account does not hold that much."),
        (_, "unknown_account") => ("There is no such account", "Check the account number."),
        (_, "same_account") => ("Nothing to move", "Both sides of the transfer are the same account."),
        (_, "balance_too_large") => ("Too much", "The receiving account cannot hold that much."),
        (_, "key_in_use") => ("This form was used before", "Open the account again and fill in a new form."),
        (_, "in_flight") => ("On its way", "This transfer is being made right now."),
        (_, "unresolved") => (
            "We do not know yet",
            "The transfer was made once, or not at all. Reload this page to send the same form again: \
             it will not move money twice.",
        ),
        (_, "starting") => ("One moment", "The bank is starting. Try again shortly."),
        (_, "no_person") => ("For whom?", "This page shows a person's accounts, and nobody is logged in."),
        (StatusCode::FORBIDDEN, _) => ("Not allowed", "A policy of the mesh refused this."),
        (StatusCode::UNAUTHORIZED, _) => ("Who is asking?", "The request came for nobody. Log in again."),
        (StatusCode::NOT_FOUND, _) => ("There is no such account", "Check the account number."),
        (StatusCode::TOO_MANY_REQUESTS, _) => ("Too fast", "Wait a little and try again."),
        (status, _) if status.is_client_error() => ("That did not work", "The request was not understood."),
        _ => ("Out of order", "A part of the bank does not answer. Try again shortly."),
    }
}

fn page(title: &str, viewer: &str, content: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · Bank" }
                link rel="stylesheet" href="/assets/style.css";
                link rel="icon" type="image/svg+xml" href="/assets/icon.svg";
            }
            body {
                a .skip href="#content" { "Skip to the content" }
                header {
                    a .brand href="/" { (mark()) span { "Bank" } }
                    @if !viewer.is_empty() {
                        // The gateway's path: logging in and out is none of ours.
                        form .who action="/.palisade/logout" method="post" {
                            span { "Logged in as " strong { (viewer) } }
                            button .plain type="submit" { "Log out" }
                        }
                    }
                }
                main #content { (content) }
                footer { "A sample bank: its money is made up." }
            }
        }
    }
}

fn mark() -> Markup {
    PreEscaped(
        r#"<svg viewBox="0 0 24 24" width="26" height="26" aria-hidden="true"><rect width="24" height="24" rx="6"/><path d="M12 4.500 4.500 9v1.500h15V9zM6 12v5h2v-5zM11 12v5h2v-5zM16 12v5h2v-5zM4.500 18v1.500h15V18z"/></svg>"#
            .to_owned(),
    )
}

fn accounts_page(list: &AccountList) -> Markup {
    let total = list.accounts.iter().fold(0_i64, |sum, account| sum.saturating_add(account.balance_cents));
    let content = html! {
        h1 { "My accounts" }
        @if list.accounts.is_empty() {
            p .none { "There are no accounts under the name " strong { (list.owner) } "." }
        } @else {
            ul .accounts {
                @for account in &list.accounts {
                    li {
                        a href={ "/accounts/" (account.id) } {
                            span .name { (account.name) }
                            span .number { "No. " (account.id) }
                            span .balance { (money::shown(account.balance_cents)) }
                        }
                    }
                }
            }
            p .total { "Together " strong { (money::shown(total)) } }
        }
    };
    page("My accounts", list.owner.as_str(), &content)
}

fn account_page(account: &Account, history: &History, key: &str, viewer: &str) -> Markup {
    let content = html! {
        p .crumb { a href="/" { "My accounts" } }
        div .summary {
            div {
                h1 { (account.name) }
                p .number { "No. " (account.id) " · " (account.owner) " · " (account.currency) }
            }
            p .balance { span .visually-hidden { "Balance " } (money::shown(account.balance_cents)) }
        }
        div .columns {
            section aria-labelledby="history" {
                h2 #history { "History" }
                (entries(&history.entries))
            }
            section .transfer aria-labelledby="transfer" {
                h2 #transfer { "Transfer" }
                form action="/transfers" method="post" {
                    input type="hidden" name="from" value=(account.id);
                    input type="hidden" name="key" value=(key);
                    label for="to" { "To account no." }
                    input #to name="to" required maxlength="64" autocomplete="off" inputmode="numeric";
                    label for="amount" { "Amount in " (account.currency) }
                    input #amount name="amount" required autocomplete="off" inputmode="decimal"
                        pattern="[0-9]+([.,][0-9]{1,2})?" title="Like 12 or 12.50" placeholder="0.00";
                    label for="memo" { "Memo " span .quiet { "(optional)" } }
                    input #memo name="memo" maxlength="140" autocomplete="off";
                    button type="submit" { "Send money" }
                }
            }
        }
    };
    page(&account.name, viewer, &content)
}

fn entries(entries: &[Entry]) -> Markup {
    html! {
        @if entries.is_empty() {
            p .none { "No transfers yet." }
        } @else {
            ol .entries {
                @for entry in entries {
                    li .in[entry.direction == Direction::In] {
                        div .what {
                            span {
                                @match entry.direction { Direction::In => "From ", Direction::Out => "To " }
                                "no. " (entry.other)
                            }
                            @if !entry.memo.as_str().is_empty() { span .memo { (entry.memo) } }
                            time datetime=(machine_time(entry.time_s)) { (shown_time(entry.time_s)) }
                        }
                        div .sums {
                            span .amount {
                                @match entry.direction {
                                    Direction::In => { "+" (money::shown(entry.amount_cents)) },
                                    Direction::Out => (money::shown(entry.amount_cents.saturating_neg())),
                                }
                            }
                            span .after { span .word { "Balance " } (money::shown(entry.balance_cents)) }
                        }
                    }
                }
            }
        }
    }
}

fn shown_time(seconds: u64) -> String {
    let format = format_description!("[day padding:none] [month repr:short] [year], [hour]:[minute] UTC");
    at(seconds).and_then(|at| at.format(format).ok()).unwrap_or_default()
}

fn machine_time(seconds: u64) -> String {
    at(seconds)
        .and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_default()
}

fn at(seconds: u64) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_shows_its_receipt_and_nothing_is_markup() {
        let problem = Problem {
            status: StatusCode::FORBIDDEN,
            title: "Not allowed",
            words: "A policy of the mesh refused this.".to_owned(),
            receipt: Some("r-1<script>".to_owned()),
        };
        let response = problem.page("<b>alice</b>");
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let body = runtime.block_on(axum::body::to_bytes(response.into_body(), 65_536)).unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(text.contains("palisade explain <span class=\"whole\">r-1&lt;script&gt;"));
        assert!(!text.contains("<script") && !text.contains("<b>alice"));
    }

    #[test]
    fn history_times_are_for_people_and_machines() {
        assert_eq!(shown_time(1_772_355_600), "1 Mar 2026, 09:00 UTC");
        assert_eq!(machine_time(1_772_355_600), "2026-03-01T09:00:00Z");
        assert_eq!(shown_time(u64::MAX), "");
    }
}
