//! `palisade id`: what identity this very process gets from the agent.

use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Subcommand;
use identity::workload_api::{self, WorkloadApiError};
use identity::{BundleSet, SpiffeId, TrustBundle, X509Svid};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::Global;
use crate::cmd::{admin, config};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

/// Version of the JSON form.
const VERSION: u32 = 1;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Ask the agent for this process's X.509-SVID, by what this process is.
    Fetch {
        /// The agent's socket. Default: $SPIFFE_ENDPOINT_SOCKET, else the one in mesh.toml.
        #[arg(long, value_name = "ADDRESS")]
        socket: Option<String>,
        /// Print certificate, private key and bundle as JSON: keep it as the secret it is.
        #[arg(long)]
        json: bool,
    },
    /// Say by which pseudonym a person stands in recorded decisions, where [telemetry] personal keeps people out of them.
    Pseudonym {
        /// The user's id, or another value of a personal attribute.
        value: String,
    },
}

/// An SVID as `--json` prints it; DER in base64.
#[derive(Serialize, Deserialize)]
struct Fetched {
    version: u32,
    spiffe_id: SpiffeId,
    x509_svid: String,
    x509_svid_key: String,
    bundle: String,
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let (socket, json) = match &args.what {
        What::Fetch { socket, json } => (socket, json),
        What::Pseudonym { value } => {
            let value = value.clone();
            let pseudonym = admin::ask(global, async move |client| client.pseudonym(&value).await)?;
            printer.data(&format!("{pseudonym}\n"))?;
            return Ok(Exit::Ok);
        }
    };
    let socket = match socket.clone().or_else(|| std::env::var("SPIFFE_ENDPOINT_SOCKET").ok()) {
        Some(address) => workload_api::parse_address(&address)
            .map_err(|error| Failure::usage("the agent's address is not usable").because(&error))?,
        None => config::load(&global.config)?.agent.socket,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    let (svid, bundles) =
        runtime.block_on(workload_api::fetch_once(&socket)).map_err(|error| refused(&socket, &error))?;
    let text = if *json { as_json(&svid, &bundles)? } else { as_text(&svid) };
    printer.data(&text)?;
    Ok(Exit::Ok)
}

fn refused(socket: &Path, error: &WorkloadApiError) -> Failure {
    let failure = Failure::new("the agent gave no identity");
    match error {
        WorkloadApiError::Status(status) if status.code() == workload_api::PERMISSION_DENIED => Failure {
            exit: Exit::Denied,
            causes: vec![status.message().to_owned()],
            ..failure.hint("no registration matches this process: compare it with `attest` in mesh.toml")
        },
        // The whole of a status repeats its own causes, in the words of a transport.
        WorkloadApiError::Status(status) => Failure {
            causes: vec![format!("nothing answers at {}: {}", socket.display(), status.message())],
            ..failure.hint("is the agent running, and is this its socket? name it with --socket")
        },
        error => failure.because(error),
    }
}

fn as_text(svid: &X509Svid) -> String {
    let until = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + svid.not_after());
    format!("SPIFFE ID  {}\nserial     {}\nvalid until {until}\n", svid.id(), svid.serial())
}

fn as_json(svid: &X509Svid, bundles: &BundleSet) -> Result<String, Failure> {
    let chain: Vec<u8> = svid.chain().iter().flat_map(|der| der.iter().copied()).collect();
    let bundle =
        bundles.get(svid.id().trust_domain()).map(|bundle| bundle.concatenated()).unwrap_or_default();
    let fetched = Fetched {
        version: VERSION,
        spiffe_id: svid.id().clone(),
        x509_svid: STANDARD.encode(chain),
        x509_svid_key: STANDARD.encode(svid.key_pkcs8()),
        bundle: STANDARD.encode(bundle),
    };
    let json = serde_json::to_string(&fetched)
        .map_err(|error| Failure::new("the identity cannot be written").because(&error))?;
    Ok(format!("{json}\n"))
}

/// Becomes the workload whose program this is, by running it: what an attacker on its host could do.
pub(crate) fn fetch_as(program: &Path, socket: &Path) -> anyhow::Result<(X509Svid, BundleSet)> {
    let socket: PathBuf = socket.to_owned();
    let output = Command::new(program).args(["id", "fetch", "--json", "--socket"]).arg(&socket).output()?;
    anyhow::ensure!(
        output.status.success(),
        "{} got no identity: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let stdout = Zeroizing::new(output.stdout);
    let fetched: Fetched = serde_json::from_slice(&stdout)?;
    let key = Zeroizing::new(STANDARD.decode(fetched.x509_svid_key)?);
    let svid = X509Svid::from_concatenated(&STANDARD.decode(fetched.x509_svid)?, key)?;
    let bundle =
        TrustBundle::from_concatenated(svid.id().trust_domain().clone(), &STANDARD.decode(fetched.bundle)?)?;
    Ok((svid, BundleSet::new([bundle])))
}
