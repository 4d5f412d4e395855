//! LoRA adapters at run time, also in SageMaker's shape: none can be loaded, so none is there to unload.

use std::sync::Arc;

use axum::extract::{Path, State};

use crate::server::App;
use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::field::request_body;

request_body! {
    pub struct LoadRequest {
        pub lora_name: String,
        pub lora_path: String,
        pub load_inplace: bool,
        pub is_3d_lora_weight: bool,
    }
}

request_body! {
    pub struct UnloadRequest {
        pub lora_name: String,
        pub lora_int_id: i64,
    }
}

request_body! {
    pub struct AdapterRequest {
        pub name: String,
        pub src: String,
    }
}

/// `POST /v1/load_lora_adapter`.
pub async fn load(State(app): State<Arc<App>>, JsonBody(request): JsonBody<LoadRequest>) -> ApiError {
    refuse_load(&app, "lora_name", request.lora_name, "lora_path", request.lora_path)
}

/// `POST /adapters`.
pub async fn load_adapter(State(app): State<Arc<App>>, JsonBody(request): JsonBody<AdapterRequest>) -> ApiError {
    refuse_load(&app, "name", request.name, "src", request.src)
}

fn refuse_load(app: &App, name_field: &str, name: Option<String>, path_field: &str, path: Option<String>) -> ApiError {
    let (Some(name), path) = (name, path) else {
        return ApiError::missing(name_field);
    };
    let Some(path) = path else {
        return ApiError::missing(path_field);
    };
    if name.is_empty() || path.is_empty() {
        return ApiError::invalid_user_input(format!("Both '{name_field}' and '{path_field}' must be provided."));
    }
    if app.model.served_names.contains(&name) {
        return ApiError::invalid_user_input(format!("'{name}' is the name of the base model"));
    }
    ApiError::not_implemented("LoRA adapters cannot be loaded; merge the adapter into the model")
}

/// `POST /v1/unload_lora_adapter`.
pub async fn unload(JsonBody(request): JsonBody<UnloadRequest>) -> ApiError {
    match request.lora_name {
        None => ApiError::missing("lora_name"),
        Some(name) if name.is_empty() => ApiError::invalid_user_input("'lora_name' must be provided."),
        Some(name) => ApiError::adapter_not_found(&name),
    }
}

/// `DELETE /adapters/{adapter_name}`.
pub async fn unload_adapter(Path(name): Path<String>) -> ApiError {
    ApiError::adapter_not_found(&name)
}
