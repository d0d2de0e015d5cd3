//! `palisade token`: what a new host joins with.

use std::time::Duration;

use clap::Subcommand;

use crate::Global;
use crate::cmd::admin;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Make a token with which one host may join, once.
    Create {
        /// The host, as its agent will call itself.
        host: String,
        /// How long it can be used, at most a day.
        #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = humantime::parse_duration)]
        ttl: Duration,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the authorities that a joining agent verifies control by, PEM.
    Bundle,
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    match &args.what {
        What::Create { host, ttl, json } => {
            let token = admin::ask(global, async |client| client.create_join_token(host, *ttl).await)?;
            if *json {
                printer.data(&format!(
                    "{:#}\n",
                    serde_json::json!({"version": 1, "host": token.host, "token": token.token, "expires": token.expires})
                ))?;
            } else {
                printer.data(&format!("{}\n", token.token))?;
                let lives = humantime::format_duration(*ttl);
                printer.progress(&format!(
                    "{host} may join with it once, within {lives}; keep it in a file of mode 0600"
                ));
            }
        }
        What::Bundle => printer.data(&admin::ask(global, async |client| client.bundle().await)?)?,
    }
    Ok(Exit::Ok)
}
