//! `GET /v1/models`: every served name.

mod types;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use self::types::{ModelCard, ModelList, ModelPermission};
use crate::server::App;
use crate::server::ids;

pub async fn list(State(app): State<Arc<App>>) -> Json<ModelList> {
    let created = ids::unix_seconds();
    let data = app
        .model
        .served_names
        .iter()
        .map(|name| card(name, &app, created))
        .collect();
    Json(ModelList { object: "list", data })
}

fn card(name: &str, app: &App, created: u64) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created,
        owned_by: "vllm",
        root: app.model.root.clone(),
        parent: None,
        max_model_len: app.model.max_model_len,
        permission: [ModelPermission {
            id: ids::prefixed("modelperm-"),
            object: "model_permission",
            created,
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*",
            group: None,
            is_blocking: false,
        }],
    }
}
