//! Responses that can be asked for again: `VLLM_ENABLE_RESPONSES_API_STORE`. In memory and bounded; what is oldest goes
//! first, and a restart forgets all.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::output::{Response, Status};
use crate::server::sse::Frames;

/// vLLM keeps every response for ever.
const MAX_RESPONSES: usize = 4096;
const MAX_BYTES: usize = 128 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A response and what continues it.
pub struct Stored {
    response: Mutex<Response>,
    /// The conversation that was answered, without instructions.
    messages: Vec<Value>,
    /// Of a response that is streamed from the background.
    events: Option<EventLog>,
    /// What makes it, in the background.
    task: Mutex<Option<AbortHandle>>,
}

impl Stored {
    pub fn new(response: Response, messages: Vec<Value>) -> Self {
        Self {
            response: Mutex::new(response),
            messages,
            events: None,
            task: Mutex::new(None),
        }
    }

    /// Its events can be followed and replayed.
    pub fn with_events(mut self) -> Self {
        self.events = Some(EventLog::new());
        self
    }

    pub fn response(&self) -> Response {
        lock(&self.response).clone()
    }

    pub fn messages(&self) -> &[Value] {
        &self.messages
    }

    pub fn events(&self) -> Option<&EventLog> {
        self.events.as_ref()
    }

    /// The task of a response in the background; ended at once if the response was cancelled meanwhile.
    pub fn set_task(&self, task: AbortHandle) {
        if lock(&self.response).status.is_running() {
            *lock(&self.task) = Some(task);
        } else {
            task.abort();
        }
    }

    /// The newest state of a response in the background, unless it was cancelled.
    pub fn update(&self, response: &Response) {
        let mut stored = lock(&self.response);
        if stored.status.is_running() {
            *stored = response.clone();
        }
    }

    /// Ends what runs. None: nothing runs.
    pub fn cancel(&self) -> Option<Response> {
        let response = {
            let mut stored = lock(&self.response);
            if !stored.status.is_running() {
                return None;
            }
            stored.status = Status::Cancelled;
            stored.clone()
        };
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
        if let Some(events) = &self.events {
            events.close();
        }
        Some(response)
    }

    fn is_running(&self) -> bool {
        lock(&self.response).status.is_running()
    }

    /// Roughly.
    fn bytes(&self) -> usize {
        let length = |json: serde_json::Result<String>| json.map_or(0, |json| json.len());
        length(serde_json::to_string(&self.messages))
            + length(serde_json::to_string(&*lock(&self.response)))
            + self.events.as_ref().map_or(0, EventLog::bytes)
    }
}

/// The events of one response, one frame each, for any number of readers.
pub struct EventLog {
    frames: Mutex<Vec<Frames>>,
    /// How many there are, and whether more can come.
    progress: watch::Sender<(usize, bool)>,
}

impl EventLog {
    fn new() -> Self {
        Self {
            frames: Mutex::new(Vec::new()),
            progress: watch::Sender::new((0, true)),
        }
    }

    pub fn push(&self, frames: Frames) {
        let count = {
            let mut log = lock(&self.frames);
            log.push(frames);
            log.len()
        };
        self.progress.send_modify(|progress| progress.0 = count);
    }

    /// No more will come.
    pub fn close(&self) {
        self.progress.send_modify(|progress| progress.1 = false);
    }

    /// The events from `index` on; waits for one. None: it was the last.
    pub async fn read(&self, index: usize) -> Option<Frames> {
        let mut progress = self.progress.subscribe();
        let reached = progress.wait_for(|(count, open)| *count > index || !open).await;
        reached.ok()?;
        lock(&self.frames).get(index).cloned()
    }

    fn bytes(&self) -> usize {
        lock(&self.frames).iter().map(Frames::len).sum()
    }
}

/// Bounded; see the module.
#[derive(Default)]
pub struct ResponseStore(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    /// With the bytes it was last counted with.
    by_id: HashMap<String, (Arc<Stored>, usize)>,
    /// Oldest first.
    order: VecDeque<String>,
    bytes: usize,
}

impl ResponseStore {
    pub fn get(&self, id: &str) -> Option<Arc<Stored>> {
        lock(&self.0).by_id.get(id).map(|(stored, _)| stored.clone())
    }

    pub fn insert(&self, id: String, stored: Arc<Stored>) {
        let bytes = stored.bytes();
        let mut entries = lock(&self.0);
        entries.remove(&id);
        entries.by_id.insert(id.clone(), (stored, bytes));
        entries.order.push_back(id);
        entries.bytes += bytes;
        entries.evict(MAX_RESPONSES, MAX_BYTES);
    }

    /// Counts a response again that has grown.
    pub fn recount(&self, id: &str) {
        let mut entries = lock(&self.0);
        let Some((stored, before)) = entries.by_id.get_mut(id) else {
            return;
        };
        let bytes = stored.bytes();
        let before = std::mem::replace(before, bytes);
        entries.bytes = entries.bytes - before + bytes;
        entries.evict(MAX_RESPONSES, MAX_BYTES);
    }
}

impl Entries {
    fn remove(&mut self, id: &str) {
        if let Some((_, bytes)) = self.by_id.remove(id) {
            self.bytes -= bytes;
            self.order.retain(|known| known != id);
        }
    }

    /// What still runs stays: the queue's limits bound it.
    fn evict(&mut self, max_responses: usize, max_bytes: usize) {
        while self.by_id.len() > max_responses || self.bytes > max_bytes {
            let oldest = self
                .order
                .iter()
                .find(|id| self.by_id.get(*id).is_some_and(|(stored, _)| !stored.is_running()));
            let Some(oldest) = oldest.cloned() else { return };
            self.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::testing::response;
    use super::*;

    fn frame(number: u32) -> Frames {
        let mut frames = Frames::default();
        frames.push(&number);
        frames
    }

    #[test]
    fn the_oldest_finished_response_goes_first() {
        let mut entries = Entries::default();
        for (id, status) in [
            ("a", Status::InProgress),
            ("b", Status::Completed),
            ("c", Status::Failed),
            ("d", Status::Completed),
        ] {
            let stored = Stored::new(Response { status, ..response() }, Vec::new());
            entries.by_id.insert(id.into(), (Arc::new(stored), 10));
            entries.order.push_back(id.into());
            entries.bytes += 10;
        }
        entries.evict(3, 1000);
        assert_eq!(entries.order, ["a", "c", "d"]);
        entries.evict(3, 15);
        assert_eq!((entries.order, entries.bytes), (["a".to_owned()].into(), 10));
    }

    #[test]
    fn a_cancelled_response_stays_cancelled() {
        let stored = Stored::new(response(), Vec::new());
        assert_eq!(stored.cancel().unwrap().status, Status::Cancelled);
        assert!(stored.cancel().is_none());
        stored.update(&Response {
            status: Status::Completed,
            ..response()
        });
        assert_eq!(stored.response().status, Status::Cancelled);
    }

    #[tokio::test]
    async fn readers_follow_the_log_to_its_end() {
        let log = Arc::new(EventLog::new());
        log.push(frame(0));
        let reader = tokio::spawn({
            let log = log.clone();
            async move {
                let mut seen = Vec::new();
                while let Some(frames) = log.read(seen.len()).await {
                    seen.push(frames);
                }
                seen
            }
        });
        tokio::task::yield_now().await;
        log.push(frame(1));
        log.close();
        assert_eq!(reader.await.unwrap(), [frame(0), frame(1)]);
        assert_eq!(log.read(1).await, Some(frame(1)));
        assert_eq!(log.read(2).await, None);
    }
}
