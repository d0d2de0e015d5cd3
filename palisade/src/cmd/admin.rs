//! Asking control over its admin socket.

use ca::admin::{AdminClient, AdminError};
use identity::SystemClock;

use crate::Global;
use crate::cmd::config;
use crate::failure::{Exit, Failure};

/// Asks the control of the mesh that the command line names.
pub(crate) fn ask<T>(
    global: &Global,
    question: impl AsyncFnOnce(AdminClient) -> Result<T, AdminError>,
) -> Result<T, Failure> {
    let mesh = config::load(&global.config)?;
    let client = AdminClient::new(mesh.control.admin_socket, SystemClock::shared());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    runtime.block_on(question(client)).map_err(|error| {
        let failure = Failure::new("control gave no answer").because(&error);
        match error {
            AdminError::Connect { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Failure { exit: Exit::Denied, ..failure }.hint("only the user that control runs as may")
            }
            AdminError::Connect { .. } => {
                failure.hint("run it where control runs, as the user that control runs as")
            }
            _ => failure,
        }
    })
}
