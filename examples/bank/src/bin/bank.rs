//! One of the bank's services as a process of its own: `bank web|accounts|payments`.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bank::accounts::AccountsConfig;
use bank::payments::PaymentsConfig;
use bank::web::WebConfig;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// The sample bank. Every address of another service is an outbound port of this one's sidecar.
#[derive(Debug, Parser)]
#[command(name = "bank", version)]
enum Service {
    /// The pages.
    Web {
        /// Where to listen; a loopback address that only the sidecar calls. Port 0 takes a free one.
        #[arg(long)]
        listen: SocketAddr,
        /// The sidecar's outbound port for accounts.
        #[arg(long)]
        accounts: SocketAddr,
        /// The sidecar's outbound port for payments.
        #[arg(long)]
        payments: SocketAddr,
    },
    /// The ledger.
    Accounts {
        /// Where to listen; a loopback address that only the sidecar calls. Port 0 takes a free one.
        #[arg(long)]
        listen: SocketAddr,
        /// Directory of the database.
        #[arg(long)]
        state: PathBuf,
        /// The sidecar's outbound port for the vault.
        #[arg(long)]
        vault: SocketAddr,
        /// The sidecar's outbound port for payments.
        #[arg(long)]
        payments: SocketAddr,
        /// Seconds between two comparisons with payments' journal.
        #[arg(long, default_value_t = 30)]
        reconcile_seconds: u64,
    },
    /// The transfers.
    Payments {
        /// Where to listen; a loopback address that only the sidecar calls. Port 0 takes a free one.
        #[arg(long)]
        listen: SocketAddr,
        /// Directory of the journal.
        #[arg(long)]
        state: PathBuf,
        /// The sidecar's outbound port for accounts.
        #[arg(long)]
        accounts: SocketAddr,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match serve(Service::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut error: Option<&dyn std::error::Error> = Some(error.as_ref());
            let mut lead = "bank: ";
            while let Some(cause) = error {
                eprintln!("{lead}{cause}");
                lead = "  because ";
                error = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn serve(service: Service) -> Result<(), Box<dyn std::error::Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    match service {
        Service::Web { listen, accounts, payments } => {
            let config = WebConfig { listener: listener(listen)?, accounts, payments };
            bank::web::run(config, shutdown).await?;
        }
        Service::Accounts { listen, state, vault, payments, reconcile_seconds } => {
            let config = AccountsConfig {
                listener: listener(listen)?,
                state,
                vault,
                payments,
                reconcile_every: Duration::from_secs(reconcile_seconds),
            };
            bank::accounts::run(config, shutdown).await?;
        }
        Service::Payments { listen, state, accounts } => {
            bank::payments::run(PaymentsConfig { listener: listener(listen)?, state, accounts }, shutdown)
                .await?;
        }
    }
    Ok(())
}

/// Binds, and prints where: with port 0 nobody else knows.
fn listener(address: SocketAddr) -> Result<TcpListener, String> {
    let listener =
        TcpListener::bind(address).map_err(|error| format!("cannot listen on {address}: {error}"))?;
    let bound = listener.local_addr().map_err(|error| format!("cannot listen on {address}: {error}"))?;
    println!("http://{bound}");
    Ok(listener)
}
