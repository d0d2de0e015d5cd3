//! Where the demo keeps what, below its state directory.

use std::path::{Path, PathBuf};

/// The state directory's plan.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    state: PathBuf,
}

impl Layout {
    /// The plan of `state`.
    pub(crate) fn new(state: &Path) -> Self {
        Self { state: state.to_owned() }
    }

    /// The directory itself.
    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    /// The mesh's configuration, written at each start.
    pub(crate) fn mesh_toml(&self) -> PathBuf {
        self.state.join("mesh.toml")
    }

    /// The bank's policies; yours to change once they are there.
    pub(crate) fn policies(&self) -> PathBuf {
        self.state.join("policies")
    }

    /// Where a role keeps its data.
    pub(crate) fn data(&self, role: &str) -> PathBuf {
        self.state.join("data").join(role)
    }

    /// A role's credentials, as systemd would hand them to its unit.
    pub(crate) fn credentials(&self, role: &str) -> PathBuf {
        self.state.join("credentials").join(role)
    }

    /// The users of the embedded OIDC provider: names and password hashes.
    pub(crate) fn users(&self) -> PathBuf {
        self.state.join("users.toml")
    }

    /// The authorities, PEM.
    pub(crate) fn ca_bundle(&self) -> PathBuf {
        self.state.join("ca.pem")
    }

    /// The program of a role: its own hard link of the binary, so that attestation tells roles apart.
    pub(crate) fn program(&self, role: &str) -> PathBuf {
        self.state.join("bin").join(role)
    }

    /// The default ready file.
    pub(crate) fn ready(&self) -> PathBuf {
        self.state.join("ready.json")
    }

    /// Control's socket for the command line. Not below the state directory, whose path may be longer than
    /// the 107 bytes that a socket's may have.
    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.sockets().join("control").join("admin.sock")
    }

    /// The Workload API's socket.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.sockets().join("agent.sock")
    }

    /// The directory of the sockets, one for each state directory and user.
    pub(crate) fn sockets(&self) -> PathBuf {
        let mut name = format!("{}:", rustix::process::getuid().as_raw()).into_bytes();
        name.extend_from_slice(self.state.as_os_str().as_encoded_bytes());
        let hash = identity::hex::sha256(&name);
        std::env::temp_dir().join(format!("palisade-{}", hash.get(..12).unwrap_or(&hash)))
    }
}
