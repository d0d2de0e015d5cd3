//! Live pages: a stream of server-sent events, each a freshly rendered fragment.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use futures::Stream;
use futures::future::BoxFuture;
use maud::Markup;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Each open page holds a stream and re-renders on every change; a console is looked at by few.
pub(crate) const STREAMS_MAX: usize = 32;
/// At most this often, however fast decisions come: faster cannot be read.
const RENDER_EVERY_MS: u64 = 500;
/// Re-rendered at least this often, so that what is only a matter of time (an identity that nears its
/// end) is seen too.
const RENDER_AT_LEAST_EVERY_S: u64 = 10;
/// Under the shortest idle timeout of usual proxies.
const KEEP_ALIVE_S: u64 = 15;

/// Renders the fragment anew.
pub(crate) type Render = Arc<dyn Fn() -> BoxFuture<'static, Markup> + Send + Sync>;

/// The pool of streams.
#[derive(Debug, Clone)]
pub(crate) struct Streams(Arc<Semaphore>);

impl Default for Streams {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(STREAMS_MAX)))
    }
}

impl Streams {
    /// A place for one more stream, if there is one.
    pub(crate) fn take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0).try_acquire_owned().ok()
    }
}

struct Feed {
    changes: Receiver<u64>,
    render: Render,
    shown: Option<String>,
    /// Held for as long as the browser listens.
    _place: OwnedSemaphorePermit,
}

/// Sends the fragment whenever it looks different, until the model goes away.
pub(crate) fn stream(
    changes: Receiver<u64>,
    render: Render,
    place: OwnedSemaphorePermit,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let feed = Feed { changes, render, shown: None, _place: place };
    let events = futures::stream::unfold(feed, |mut feed| async move {
        loop {
            // The first goes out at once: the page may have been rendered a while ago.
            if feed.shown.is_some() && !feed.changed().await {
                return None;
            }
            let fragment = (feed.render)().await.into_string();
            if feed.shown.as_ref() != Some(&fragment) {
                let event = Event::default().event("fragment").data(&fragment);
                feed.shown = Some(fragment);
                return Some((Ok(event), feed));
            }
        }
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(KEEP_ALIVE_S)))
}

impl Feed {
    /// Waits for a change or the clock; false once there will be no more changes.
    async fn changed(&mut self) -> bool {
        tokio::time::sleep(Duration::from_millis(RENDER_EVERY_MS)).await;
        let at_least = Duration::from_secs(RENDER_AT_LEAST_EVERY_S);
        match tokio::time::timeout(at_least, self.changes.recv()).await {
            Ok(Ok(_)) | Ok(Err(RecvError::Lagged(_))) | Err(_) => {}
            Ok(Err(RecvError::Closed)) => return false,
        }
        // One render covers everything that piled up.
        self.changes = self.changes.resubscribe();
        true
    }
}
