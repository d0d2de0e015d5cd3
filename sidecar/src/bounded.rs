//! Answers that end when their time is over.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body::{Frame, SizeHint};
use identity::clock::SharedClock;

use crate::traffic::timeouts::Bounds;
use crate::{Body, BoxError, grpc};

/// The body, until `bounds` are reached. The end of a gRPC `call` then says why; any other is cut short.
pub fn body(body: Body, bounds: &Bounds, call: bool, clock: &SharedClock) -> Body {
    let left = bounds.whole.left(clock.now());
    if body.whole().is_some() || (left.is_none() && bounds.idle.is_none()) {
        return body;
    }
    let timer = |limit: Duration| (limit, clock.sleep(limit));
    let whole = left.map(|left| clock.sleep(left));
    let idle = bounds.idle.map(timer);
    Body::new(Bounded { body, whole, idle, call, over: false, clock: clock.clone() })
}

struct Bounded {
    body: Body,
    whole: Option<BoxFuture<'static, ()>>,
    idle: Option<(Duration, BoxFuture<'static, ()>)>,
    call: bool,
    over: bool,
    clock: SharedClock,
}

impl Bounded {
    fn end(&mut self, code: u8, why: &'static str) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.over = true;
        // Whoever works on the rest hears that nobody waits for it.
        self.body = Body::empty();
        tracing::debug!(why, "an answer was ended");
        Poll::Ready(Some(if self.call {
            Ok(Frame::trailers(grpc::trailers(code, why)))
        } else {
            Err(why.into())
        }))
    }
}

impl http_body::Body for Bounded {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if this.over {
            return Poll::Ready(None);
        }
        if this.whole.as_mut().is_some_and(|whole| whole.as_mut().poll(cx).is_ready()) {
            return this.end(grpc::DEADLINE_EXCEEDED, "the answer took too long");
        }
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                if let Some((limit, timer)) = &mut this.idle {
                    *timer = this.clock.sleep(*limit);
                }
                Poll::Ready(frame)
            }
            Poll::Pending => {
                if this.idle.as_mut().is_some_and(|(_, timer)| timer.as_mut().poll(cx).is_ready()) {
                    return this.end(grpc::UNAVAILABLE, "nothing more of the answer came for too long");
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http_body_util::{BodyExt as _, StreamBody};
    use identity::clock::ManualClock;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::UnboundedReceiverStream;

    use super::*;
    use crate::traffic::timeouts::Deadline;

    const NOW: Duration = Duration::from_secs(1_700_000_000);

    struct Stage {
        clock: Arc<ManualClock>,
        app: mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>,
        body: Body,
    }

    fn stage(whole: Option<u64>, idle: Option<u64>, call: bool) -> Stage {
        let clock = ManualClock::at(NOW);
        let (app, pieces) = mpsc::unbounded_channel();
        let pieces = Body::new(StreamBody::new(UnboundedReceiverStream::new(pieces)));
        let whole =
            whole.map_or(Deadline::NEVER, |seconds| Deadline::within(Duration::from_secs(seconds), NOW));
        let bounds = Bounds { head: Deadline::NEVER, whole, idle: idle.map(Duration::from_secs) };
        let shared: SharedClock = clock.clone();
        Stage { clock, app, body: body(pieces, &bounds, call, &shared) }
    }

    impl Stage {
        fn say(&self, word: &'static str) {
            self.app.send(Ok(Frame::data(Bytes::from(word)))).unwrap();
        }

        async fn hear(&mut self) -> Option<Result<Frame<Bytes>, BoxError>> {
            self.body.frame().await
        }

        async fn hears(&mut self, word: &str) {
            assert_eq!(self.hear().await.unwrap().unwrap().into_data().unwrap(), word);
        }
    }

    #[tokio::test]
    async fn a_call_ends_at_its_deadline_and_its_callee_hears_of_it() {
        let mut stage = stage(Some(5), None, true);
        stage.say("one");
        stage.hears("one").await;
        stage.clock.advance(Duration::from_secs(5));
        let trailers = stage.hear().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "4");
        assert!(stage.hear().await.is_none());
        assert!(stage.app.is_closed());
    }

    #[tokio::test]
    async fn an_answer_that_is_no_call_is_cut_short() {
        let mut stage = stage(Some(5), None, false);
        stage.clock.advance(Duration::from_secs(6));
        assert!(stage.hear().await.unwrap().is_err());
        assert!(stage.app.is_closed());
    }

    #[tokio::test]
    async fn pauses_are_bounded_and_what_comes_in_time_goes_on() {
        let mut stage = stage(None, Some(5), true);
        for _ in 0..10 {
            stage.clock.advance(Duration::from_secs(4));
            stage.say("more");
            stage.hears("more").await;
        }
        stage.clock.advance(Duration::from_secs(5));
        let trailers = stage.hear().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "14");
    }

    #[tokio::test]
    async fn without_bounds_nothing_is_wrapped() {
        let stage = stage(None, None, true);
        stage.say("one");
        drop(stage.app);
        assert_eq!(stage.body.collect().await.unwrap().to_bytes(), "one");
        let whole =
            Bounds { head: Deadline::NEVER, whole: Deadline::within(Duration::ZERO, NOW), idle: None };
        let clock: SharedClock = stage.clock;
        assert_eq!(body(Body::from(Bytes::from("here")), &whole, false, &clock).whole(), Some(&b"here"[..]));
    }
}
