//! Values of flags: read by clap, judged by the table, handed out as one typed struct per group.

use std::error::Error as _;

use clap::builder::ValueParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::CliError;
use super::normalize::Normalized;
use super::table::{Flag, FlagSet, Kind, Nargs, Verdict};
use super::values::parse_value;
use crate::config::args::{Effect, GivenFlag};

/// The value of every flag, by `dest`.
#[derive(Debug)]
pub struct Values {
    by_dest: Map<String, Value>,
}

impl Values {
    /// # Errors
    /// argparse's message for a bad value.
    pub fn read(set: &FlagSet, normalized: &Normalized) -> Result<Self, CliError> {
        let command = clap::Command::new("rvllm")
            .disable_help_flag(true)
            .disable_version_flag(true);
        let command = command.args(set.iter().filter(|f| !f.is_positional()).map(arg));
        let argv = normalized.occurrences.iter().flat_map(|occurrence| {
            let name = occurrence.flag.name();
            // A bare flag whose value is optional: argparse's `const`.
            let bare = occurrence.values.is_empty().then(|| format!("{name}={BARE}"));
            bare.into_iter()
                .chain(occurrence.values.iter().map(move |value| format!("{name}={value}")))
        });
        let argv = std::iter::once("rvllm".to_owned()).chain(argv);
        let matches = command
            .try_get_matches_from(argv)
            .map_err(|error| CliError::Usage(message(set, &error)))?;

        let mut by_dest = Map::new();
        for flag in set.iter().filter(|f| !f.is_positional() && f.kind != Kind::Help) {
            let dest = flag.dest();
            let value = match matches.get_many::<Value>(&dest) {
                Some(values) if flag.is_list() => Value::Array(values.filter(|v| !v.is_null()).cloned().collect()),
                Some(mut values) => values.next_back().cloned().unwrap_or(Value::Null),
                None => flag.default.clone(),
            };
            by_dest.insert(dest, value);
        }
        Ok(Self { by_dest })
    }

    /// The part of the values that `T` names.
    ///
    /// # Errors
    /// A value does not have the field's type; the message names the flag.
    pub fn group<T: DeserializeOwned>(&self) -> Result<T, CliError> {
        serde_path_to_error::deserialize(&Value::Object(self.by_dest.clone())).map_err(|error| {
            let flag = error.path().to_string().replace('_', "-");
            CliError::Usage(format!("argument --{flag}: {}", error.inner()))
        })
    }

    pub fn get(&self, dest: &str) -> &Value {
        self.by_dest.get(dest).unwrap_or(&Value::Null)
    }

    /// What becomes of each flag that was given, in the order of the command line; a refused one's text is the whole message.
    pub fn judge(&self, normalized: &Normalized) -> Vec<GivenFlag> {
        let judged = normalized.occurrences.iter().map(|occurrence| {
            let flag = occurrence.flag;
            let value = self.get(&flag.dest());
            let allowed = is_default(flag, value) || flag.allow.iter().flatten().any(|allowed| same(allowed, value));
            let refused = |reason: &str| {
                let text = format!("{} is not supported: {reason}", given(flag, value));
                (Effect::Refused, text)
            };
            let (effect, text) = match flag.here {
                Verdict::Accepted => (Effect::Accepted, flag.text.clone()),
                Verdict::Refused if !allowed => refused(&flag.text),
                Verdict::Honoured if !allowed && flag.allow.is_some() => {
                    refused(flag.otherwise.as_deref().unwrap_or(&flag.text))
                }
                Verdict::Refused => (Effect::Unchanged, "This is how the server works.".to_owned()),
                Verdict::Honoured => (Effect::Honoured, flag.text.clone()),
            };
            GivenFlag {
                flag: flag.name().to_owned(),
                value: shown(flag, value),
                effect,
                text,
            }
        });
        judged.chain(normalized.legacy.iter().cloned()).collect()
    }
}

/// Flags whose values nobody may read over a shoulder.
const SECRETS: [&str; 2] = ["--api-key", "--hf-token"];

/// A value for people to read.
fn shown(flag: &Flag, value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        _ if SECRETS.contains(&flag.name()) => "***".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Stands for the missing value of a bare flag; no user can type a NUL.
const BARE: &str = "\0";

fn arg(flag: &'static Flag) -> Arg {
    let parse = move |text: &str| -> Result<Value, String> {
        if text == BARE {
            Ok(Value::Bool(true))
        } else {
            parse_value(flag, text)
        }
    };
    let action = if flag.is_list() {
        ArgAction::Append
    } else {
        ArgAction::Set
    };
    let long = flag.name().trim_start_matches('-');
    Arg::new(flag.dest())
        .long(long)
        .action(action)
        .num_args(1)
        .value_parser(ValueParser::new(parse))
}

/// argparse's wording of what clap found. The pre-pass leaves only bad values to find.
fn message(set: &FlagSet, error: &clap::Error) -> String {
    let argument = error
        .get(clap::error::ContextKind::InvalidArg)
        .map(ToString::to_string)
        .unwrap_or_default();
    let long = argument.split([' ', '=']).next().unwrap_or_default();
    let spellings = set.get(long).map_or(long.to_owned(), |flag| flag.flags.join("/"));
    match (error.kind(), error.source()) {
        (ErrorKind::ValueValidation, Some(source)) => format!("argument {spellings}: {source}"),
        _ => error.to_string().trim_start_matches("error: ").trim_end().to_owned(),
    }
}

fn is_default(flag: &Flag, value: &Value) -> bool {
    let is_empty = match value {
        Value::Object(object) => object.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Null => true,
        _ => false,
    };
    same(&flag.default, value) || is_empty || (matches!(flag.kind, Kind::Switch) && *value == Value::Bool(false))
}

/// Equal; numbers by value, so that `0` is `0.0`.
fn same(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().is_some_and(|x| b.as_f64() == Some(x))
}

/// The flag as a user would write it.
fn given(flag: &Flag, value: &Value) -> String {
    let name = flag.name();
    match value {
        Value::Bool(true) => name.to_owned(),
        Value::Bool(false) => format!("--no-{}", &name[2..]),
        Value::String(text) => format!("{name} {text}"),
        Value::Array(items) if flag.nargs == Some(Nargs::Many) => {
            let texts: Vec<String> = items
                .iter()
                .map(|v| v.as_str().map_or(v.to_string(), str::to_owned))
                .collect();
            format!("{name} {}", texts.join(" "))
        }
        other => format!("{name} {other}"),
    }
}
