//! The transfer form.

use axum::extract::rejection::FormRejection;
use axum::extract::{Form, State};
use axum::response::{IntoResponse as _, Redirect, Response};
use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderValue};
use serde::Deserialize;

use super::pages::Problem;
use super::{Bank, money};
use crate::call::Trace;
use crate::wire::{AccountId, Amount, Memo, Refusal, TransferOrder, USER};

/// The form's fields, as typed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fields {
    from: String,
    to: String,
    amount: String,
    #[serde(default)]
    memo: String,
    /// Made with the form, so that sending it twice is one transfer. A form made by a script may do
    /// without.
    #[serde(default)]
    key: String,
}

impl Fields {
    fn order(self) -> Result<(TransferOrder, String), &'static str> {
        let from = AccountId::try_from(self.from.trim().to_owned());
        let to = AccountId::try_from(self.to.trim().to_owned());
        let amount = money::typed(&self.amount).and_then(|cents| Amount::try_from(cents).ok());
        let memo = Memo::try_from(self.memo.trim().to_owned());
        let order = TransferOrder {
            from: from.map_err(|_| "The account to pay from is not an account number.")?,
            to: to.map_err(|_| "The account to pay to is not an account number.")?,
            amount_cents: amount.ok_or("The amount is not one: write it like 12 or 12.50.")?,
            memo: memo.map_err(|_| "The memo is too long: it may have 140 characters, on one line.")?,
        };
        Ok((order, self.key))
    }
}

/// `POST /transfers`: back to the account if the transfer was made, else a page that says why not.
pub(super) async fn transfer(
    State(bank): State<Bank>,
    trace: Trace,
    headers: HeaderMap,
    fields: Result<Form<Fields>, FormRejection>,
) -> Response {
    // For the page's head only.
    let person = headers.get(USER).and_then(|user| user.to_str().ok()).unwrap_or_default();
    match order(&bank, &trace, fields).await {
        Ok(redirect) => redirect.into_response(),
        Err(problem) => problem.page(person),
    }
}

async fn order(
    bank: &Bank,
    trace: &Trace,
    fields: Result<Form<Fields>, FormRejection>,
) -> Result<Redirect, Problem> {
    let Form(fields) = fields.map_err(|rejection| {
        Problem::words(rejection.status(), "The form did not arrive whole. Go back and send it again.")
    })?;
    let (order, key) = fields.order().map_err(|words| Problem::words(StatusCode::BAD_REQUEST, words))?;
    let key = if key.is_empty() { super::fresh_key()? } else { key };
    let key =
        HeaderValue::from_str(&key).map_err(|_| Refusal::malformed("the form's key is not one of ours"))?;
    let answer = bank.transfer(&order, key, trace).await?;
    if answer.status.is_success() {
        Ok(Redirect::to(&format!("/accounts/{}", order.from)))
    } else {
        Err(Problem::from(answer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(from: &str, to: &str, amount: &str, memo: &str) -> Fields {
        Fields {
            from: from.to_owned(),
            to: to.to_owned(),
            amount: amount.to_owned(),
            memo: memo.to_owned(),
            key: String::new(),
        }
    }

    #[test]
    fn what_is_typed_becomes_an_order() {
        let (order, _) = fields("17", " 42 ", "12,50", " rent ").order().unwrap();
        assert_eq!(
            (order.to.as_str(), order.amount_cents.cents(), order.memo.as_str()),
            ("42", 1250, "rent")
        );
    }

    #[test]
    fn each_field_that_is_wrong_is_named() {
        let memo = "x".repeat(141);
        for (wrong, word) in [
            (fields("", "42", "1", ""), "from"),
            (fields("17", "4/2", "1", ""), "pay to"),
            (fields("17", "42", "-1", ""), "amount"),
            (fields("17", "42", "0", ""), "amount"),
            (fields("17", "42", "1", &memo), "memo"),
        ] {
            assert!(wrong.order().unwrap_err().contains(word), "{word}");
        }
    }
}
