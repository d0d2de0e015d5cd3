//! Log lines of the long-running verbs: JSON, one object a line.

use std::io;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Json, JsonFields};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::failure::Failure;

/// Starts logging to standard error with `filter`, which is written like `info,sidecar=debug`.
pub(crate) fn start(filter: &str) -> Result<(), Failure> {
    begin(tracing_subscriber::registry().with(json(io::stderr).with_filter(parse(filter)?)))
}

fn begin(subscriber: impl SubscriberInitExt) -> Result<(), Failure> {
    subscriber.try_init().map_err(|error| Failure::new("logging was started twice").because(&error))
}

/// One object a line, the event's own fields beside its level and time.
fn json<S, W>(writer: W) -> fmt::Layer<S, JsonFields, Format<Json>, W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    let layer = fmt::layer().json().flatten_event(true).with_current_span(false).with_span_list(false);
    // A reader that went away must not bring down a process that is draining.
    layer.with_writer(writer).log_internal_errors(false)
}

fn parse(filter: &str) -> Result<EnvFilter, Failure> {
    EnvFilter::try_new(filter).map_err(|error| {
        Failure::usage(format!("`{filter}` is no log filter"))
            .because(&error)
            .hint("write it like info, or warn,sidecar=debug")
    })
}
