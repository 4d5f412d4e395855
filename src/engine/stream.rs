//! The way back: events of one sequence from the engine's thread to whoever asked.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crossbeam_channel::Sender;
use futures_util::Stream;

use super::core::Command;
use super::scheduler::SequenceId;
use super::{EngineError, FinishReason, SequenceEvent};

/// Events of one sequence. The last one carries a finish reason or is an error; after it the stream ends.
///
/// Events wait as one merged event while nobody reads, so a slow reader costs no more memory than the sequence's own
/// output. Dropping the stream before its end aborts the sequence within a step.
#[derive(Debug)]
pub struct SequenceStream {
    mailbox: Arc<Mailbox>,
    id: SequenceId,
    /// None where no engine stands behind the stream.
    commands: Option<Sender<Command>>,
    ended: bool,
}

impl SequenceStream {
    /// The stream and the end that feeds it.
    pub(super) fn new(id: SequenceId, commands: Sender<Command>) -> (Self, SequenceSink) {
        let mailbox = Arc::new(Mailbox::default());
        let sink = SequenceSink {
            mailbox: mailbox.clone(),
            ended: false,
        };
        (
            Self {
                mailbox,
                id,
                commands: Some(commands),
                ended: false,
            },
            sink,
        )
    }

    /// A stream that is over at once.
    pub(super) fn aborted() -> Self {
        let letter = Letter {
            event: Some(SequenceEvent {
                finish: Some(FinishReason::Abort),
                ..SequenceEvent::default()
            }),
            ..Letter::default()
        };
        let mailbox = Arc::new(Mailbox {
            letter: Mutex::new(letter),
        });
        Self {
            mailbox,
            id: SequenceId(u64::MAX),
            commands: None,
            ended: false,
        }
    }

    /// Ends the sequence on the reader's account, successfully: its text is complete with the first `num_tokens` tokens.
    pub fn stop(mut self, num_tokens: usize) {
        if self.ended {
            return;
        }
        self.ended = true;
        if let Some(commands) = &self.commands {
            // A stopped engine has nothing to end.
            let _ = commands.send(Command::Stop {
                id: self.id,
                num_tokens,
            });
        }
    }

    /// All tokens since the last call; none after the end.
    pub async fn next_event(&mut self) -> Option<Result<SequenceEvent, EngineError>> {
        futures_util::StreamExt::next(self).await
    }
}

impl Stream for SequenceStream {
    type Item = Result<SequenceEvent, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut letter = self.mailbox.lock();
        let item = match (letter.event.take(), letter.error.is_some()) {
            (Some(event), _) => Ok(event),
            (None, true) => Err(letter.error.take().unwrap_or(EngineError::Stopped)),
            (None, false) => {
                letter.reader = Some(context.waker().clone());
                return Poll::Pending;
            }
        };
        drop(letter);
        self.ended = item.as_ref().map_or(true, |event| event.finish.is_some());
        Poll::Ready(Some(item))
    }
}

impl Drop for SequenceStream {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Some(commands) = &self.commands {
            // A stopped engine has nothing to abort.
            let _ = commands.send(Command::Abort(self.id));
        }
    }
}

#[derive(Debug, Default)]
struct Mailbox {
    letter: Mutex<Letter>,
}

#[derive(Debug, Default)]
struct Letter {
    event: Option<SequenceEvent>,
    error: Option<EngineError>,
    reader: Option<Waker>,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Letter> {
        self.letter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Letter)) {
        let mut letter = self.lock();
        change(&mut letter);
        let reader = letter.reader.take();
        drop(letter);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

/// The engine's end of a [`SequenceStream`]. Dropped early, it tells the reader that the engine has stopped.
#[derive(Debug)]
pub(super) struct SequenceSink {
    mailbox: Arc<Mailbox>,
    ended: bool,
}

impl SequenceSink {
    pub fn send(&mut self, event: SequenceEvent) {
        #[cfg(test)]
        super::scripted::wait_for_reader(|| {
            Arc::strong_count(&self.mailbox) == 1 || self.mailbox.lock().event.is_none()
        });
        self.ended |= event.finish.is_some();
        self.mailbox.change(|letter| match &mut letter.event {
            Some(unread) => unread.merge(event),
            None => letter.event = Some(event),
        });
    }

    pub fn fail(&mut self, error: EngineError) {
        self.ended = true;
        self.mailbox.change(|letter| letter.error = Some(error));
    }
}

impl Drop for SequenceSink {
    fn drop(&mut self) {
        if !self.ended {
            self.fail(EngineError::Stopped);
        }
    }
}

impl SequenceEvent {
    fn merge(&mut self, later: SequenceEvent) {
        self.tokens.extend(later.tokens);
        self.prompt_logprobs = self.prompt_logprobs.take().or(later.prompt_logprobs);
        self.num_cached_tokens = later.num_cached_tokens;
        self.hidden = later.hidden;
        self.finish = later.finish;
        self.timing = later.timing;
    }
}
