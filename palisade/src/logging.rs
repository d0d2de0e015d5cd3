//! Log lines of the long-running verbs: JSON on standard error, one object a line.

use tracing_subscriber::EnvFilter;

use crate::failure::Failure;

/// Starts logging with `filter`, which is written like `info,sidecar=debug`.
pub(crate) fn start(filter: &str) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Failure::usage(format!("`{filter}` is no log filter"))
            .because(&error)
            .hint("write it like info, or warn,sidecar=debug")
    })?;
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // A reader that went away must not bring down a process that is draining.
        .log_internal_errors(false)
        .try_init()
        .map_err(|error| Failure::new("logging was started twice").because(&*error))
}
