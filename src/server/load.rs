//! `/load`: inference requests between their arrival and the last byte of their answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::{Body, HttpBody};
use axum::response::Response;
use http_body_util::BodyExt;

#[derive(Clone, Debug, Default)]
pub struct Load(Arc<AtomicUsize>);

/// One request in flight.
pub struct InFlight(Arc<AtomicUsize>);

impl Load {
    pub fn current(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub fn enter(&self) -> InFlight {
        self.0.fetch_add(1, Ordering::Relaxed);
        InFlight(self.0.clone())
    }
}

impl InFlight {
    /// The request ends with its response's body; a body that is complete already has ended.
    pub fn until_end_of(self, response: Response) -> Response {
        if response.body().size_hint().exact().is_some() {
            return response;
        }
        response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                let _in_flight = &self;
                frame
            }))
        })
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
