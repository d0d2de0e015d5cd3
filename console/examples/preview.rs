//! The console on a made-up mesh, to look at the pages: `cargo run -p console --example preview`.

use std::sync::Arc;
use std::time::Duration;

use identity::clock::{Clock as _, SystemClock};
use secrecy::SecretString;

#[path = "../tests/fake/mod.rs"]
mod fake;

/// No secret: it opens made-up data on this machine.
const TOKEN: &str = "preview-preview-preview";

#[tokio::main]
async fn main() -> Result<(), std::io::Error> {
    let now = SystemClock.now_seconds();
    let healthy = std::env::args().any(|argument| argument == "--healthy");
    let mut overview = fake::overview(now);
    let mut decisions: Vec<_> =
        (0..30_u64).map(|n| fake::read(&format!("r-8f2c{n:04}"), "17", now, 3 + n * 7)).collect();
    if !healthy {
        overview.denied = 37;
        for (row, left) in overview.identities.iter_mut().zip([96, 12]) {
            row.expires = now + left;
        }
        if let Some(row) = overview.identities.last_mut() {
            row.expires = now - 4;
        }
        for (n, row) in decisions.iter_mut().enumerate().filter(|(n, _)| n % 5 == 1) {
            *row =
                fake::read(&format!("r-d00d{n:04}"), "42", now, 5 + 7 * u64::try_from(n).unwrap_or_default());
        }
        if let Some(row) = decisions.get_mut(3) {
            row.service = "payments".to_owned();
            row.verdict = console::Verdict::Denied;
            row.user = None;
            row.action = "ReadJournalTotals".to_owned();
            row.objects = vec!["Journal::\"totals\"".to_owned()];
            row.rule = None;
            row.reason = "no policy lets service/web do this".to_owned();
        }
    }
    let model = Arc::new(fake::FakeModel::new(overview, decisions));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}/?token={TOKEN}", listener.local_addr()?);
    let router =
        console::router(Arc::clone(&model) as Arc<dyn console::ReadModel>, SecretString::from(TOKEN));
    let changing = async {
        loop {
            tokio::time::sleep(Duration::from_secs(2)).await;
            model.changed();
        }
    };
    tokio::select! {
        served = axum::serve(listener, router) => served,
        () = changing => Ok(()),
    }
}
