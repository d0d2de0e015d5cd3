//! The ready file: where everything of a running demo is, for machines.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use identity::{SpiffeId, TrustDomain};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::failure::Failure;

/// Version of the ready file's form; a reader refuses one that it does not know.
pub(crate) const READY_VERSION: u32 = 1;

/// Where everything is. Holds passwords of the demo, so the file is for its owner alone.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) version: u32,
    pub(crate) trust_domain: TrustDomain,
    /// URL of the gateway.
    pub(crate) gateway: String,
    /// URL of the console.
    pub(crate) console: String,
    /// URL of the embedded OpenID Connect provider.
    pub(crate) idp: String,
    pub(crate) control: SocketAddr,
    pub(crate) agent_socket: PathBuf,
    pub(crate) vault: ReadyVault,
    pub(crate) services: BTreeMap<String, ReadyService>,
    pub(crate) users: BTreeMap<String, ReadyUser>,
    /// Process ids by role; the file is written anew when one is restarted.
    pub(crate) pids: BTreeMap<String, u32>,
    /// The state directory.
    pub(crate) state: PathBuf,
    /// The mesh's authorities, PEM: what `curl --cacert` and browsers need.
    pub(crate) ca_bundle: PathBuf,
}

impl Ready {
    /// Reads the file that a running demo wrote.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let text = fs::read(path).map_err(|error| {
            Failure::new(format!("{} cannot be read", path.display()))
                .because(&error)
                .hint("is the demo running? `palisade demo` starts it; --ready names another one's file")
        })?;
        let ready: Self = serde_json::from_slice(&text).map_err(|error| {
            Failure::invalid(format!("{} is no ready file", path.display())).because(&error)
        })?;
        if ready.version != READY_VERSION {
            let message =
                format!("{} has version {}, this is {READY_VERSION}", path.display(), ready.version);
            return Err(Failure::invalid(message));
        }
        Ok(ready)
    }
}

/// The vault of the demo.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct ReadyVault {
    /// The operator's address: `VAULT_ADDR` is `http://` and this.
    pub(crate) addr: SocketAddr,
    /// Where workloads connect, mTLS.
    pub(crate) tls_addr: SocketAddr,
    pub(crate) root_token: String,
}

/// One service of the demo.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReadyService {
    pub(crate) spiffe_id: SpiffeId,
    pub(crate) inbound: SocketAddr,
    pub(crate) app: SocketAddr,
    pub(crate) admin: SocketAddr,
    /// Where the app calls others, by their names.
    pub(crate) calls: BTreeMap<String, SocketAddr>,
}

/// One person of the demo.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct ReadyUser {
    pub(crate) password: String,
}

/// A file could not be written.
#[derive(Debug, Error)]
#[error("{} cannot be written", path.display())]
pub(crate) struct WriteError {
    path: PathBuf,
    source: io::Error,
}

/// Writes `value` as JSON, mode 0600, so that a reader sees the old file or the new one and nothing
/// between, after a power cut too.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), WriteError> {
    let attempt = || -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(value)?;
        text.push(b'\n');
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        let temporary = directory.join(hidden);
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        let written = file
            .write_all(&text)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, path))
            .and_then(|()| File::open(directory)?.sync_all());
        if written.is_err() {
            // The first error is the one to tell of.
            let _left = fs::remove_file(&temporary).is_err();
        }
        written
    };
    attempt().map_err(|source| WriteError { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn the_file_is_whole_private_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ready.json");
        for round in 0..3 {
            write_json(&path, &BTreeMap::from([("round", round)])).unwrap();
            let read: BTreeMap<String, i32> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            assert_eq!(read["round"], round);
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("no/such/ready.json");
        let error = write_json(&path, &1).unwrap_err();
        assert_eq!(error.to_string(), format!("{} cannot be written", path.display()));
        // A directory in the way: the rename fails, and nothing is left.
        let taken = directory.path().join("taken");
        fs::create_dir(&taken).unwrap();
        write_json(&taken, &1).unwrap_err();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
