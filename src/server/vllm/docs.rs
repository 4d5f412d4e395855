//! `/openapi.json` and the page that shows it, from the table of routes and the request types.

use std::fmt::Write;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Html;
use serde_json::{Map, Value, json};

use crate::server::App;
use crate::server::routes::{ROUTES, Route};

/// `GET /openapi.json`.
pub async fn openapi(State(app): State<Arc<App>>) -> Json<Value> {
    Json(document(&app))
}

/// The routes that exist, without the document's own.
fn shown(app: &App) -> impl Iterator<Item = &'static Route> {
    let own = ["/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"];
    ROUTES
        .iter()
        .filter(move |route| route.when.holds(app) && !own.contains(&route.path) && !route.path.contains("{*"))
}

fn document(app: &App) -> Value {
    let mut paths = Map::new();
    let mut schemas = Map::new();
    for route in shown(app) {
        let operations = paths.entry(route.path).or_insert_with(|| json!({}));
        for method in route.methods.split('|') {
            operations[method.to_lowercase()] = operation(route);
        }
        if let Some((name, schema)) = route.body {
            schemas.insert(name.to_owned(), schema());
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": { "title": "rvllm", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": { "schemas": schemas },
    })
}

fn operation(route: &Route) -> Value {
    let mut operation = json!({ "responses": { "200": { "description": "Successful Response" } } });
    if !route.text.is_empty() {
        operation["description"] = route.text.into();
    }
    if let Some((name, _)) = route.body {
        let reference = json!({ "$ref": format!("#/components/schemas/{name}") });
        operation["requestBody"] = json!({
            "required": true,
            "content": { "application/json": { "schema": reference } },
        });
    }
    let parameters: Vec<Value> = route
        .path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
        .collect();
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    operation
}

/// `GET /docs`, `GET /redoc`: one page without scripts.
pub async fn page(State(app): State<Arc<App>>) -> Html<String> {
    let mut html = String::from(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>rvllm</title><style>\
         body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}code{background:#eee;padding:0 .2em}\
         details{margin:.4em 0}</style></head><body>\n<h1>rvllm</h1>\n\
         <p>The schema of this page: <a href=\"openapi.json\">openapi.json</a></p>\n",
    );
    for route in shown(&app) {
        let methods = route.methods.replace('|', " ");
        // Writing to a string does not fail.
        let _ = writeln!(
            html,
            "<details><summary><code>{methods}</code> <b>{}</b></summary>",
            route.path
        );
        if !route.text.is_empty() {
            let _ = writeln!(html, "<p>{}</p>", escaped(route.text));
        }
        if let Some((name, schema)) = route.body {
            let _ = writeln!(html, "<p>Body: {name}</p><ul>");
            for (field, schema) in schema()["properties"].as_object().into_iter().flatten() {
                let schema = if schema == &json!({}) {
                    "any".to_owned()
                } else {
                    schema.to_string()
                };
                let _ = writeln!(html, "<li><code>{field}</code> {}</li>", escaped(&schema));
            }
            html += "</ul>\n";
        }
        html += "</details>\n";
    }
    Html(html + "</body></html>\n")
}

/// `GET /docs/oauth2-redirect`.
pub async fn oauth2_redirect() -> Html<&'static str> {
    Html("<!doctype html>\n<html lang=\"en\"><head><title>rvllm</title></head><body></body></html>\n")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
