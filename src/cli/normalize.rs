//! argparse's reading of a command line: from tokens to flags with their values' texts.
//!
//! What vLLM's `FlexibleArgumentParser` and argparse accept and clap does not is settled here: `_` for `-`, abbreviations,
//! `-tp 2`, `--no-x`, `-O3`, dotted JSON (`--a.b.c v`, `--a.b+ v`), one flag with several values, flags of older releases.

use serde_json::{Map, Value};

use super::CliError;
use super::table::{self, Flag, FlagSet, Kind, LegacyFlag, Nargs, Takes, Verdict};
use super::values::{human_int, insert_at, parse_bool, parse_dotted_value};
use crate::config::args::{DeviceChoice, DryRun, Effect, GivenFlag, Notice};

/// Deeper objects than any configuration has; JSON itself is read to this depth.
const MAX_DOTTED_KEYS: usize = 128;

/// A flag as it was given.
#[derive(Clone, Debug)]
pub struct Occurrence {
    pub flag: &'static Flag,
    /// `true` or `false` for boolean flags; empty for a bare flag whose value is optional.
    pub values: Vec<String>,
}

/// A command line, every flag at most once.
#[derive(Debug, Default)]
pub struct Normalized {
    pub occurrences: Vec<Occurrence>,
    pub positionals: Vec<String>,
    /// Flags of older releases and of our own, with what becomes of them.
    pub legacy: Vec<GivenFlag>,
    pub device: DeviceChoice,
    pub dry_run: Option<DryRun>,
    /// `--dry-run-device-memory`, in bytes.
    pub dry_run_device_memory: Option<u64>,
    pub notices: Vec<Notice>,
    /// `--help` (`Some("")`) or `--help=filter`; nothing after it was read.
    pub help: Option<String>,
}

impl Normalized {
    /// The values of `dest`, if it was given.
    pub fn values(&self, dest: &str) -> Option<&[String]> {
        self.occurrences
            .iter()
            .find(|o| o.flag.dest() == dest)
            .map(|o| o.values.as_slice())
    }

    /// Takes from `other`, which counts less, what this one lacks.
    pub fn fill_from(&mut self, other: Normalized) {
        let new = other
            .occurrences
            .into_iter()
            .filter(|o| !self.occurrences.iter().any(|own| own.flag.name() == o.flag.name()));
        let new: Vec<Occurrence> = new.collect();
        self.occurrences.extend(new);
        self.notices.extend(other.notices);
        self.legacy.extend(other.legacy);
        self.dry_run = self.dry_run.or(other.dry_run);
        self.dry_run_device_memory = self.dry_run_device_memory.or(other.dry_run_device_memory);
        if self.device == DeviceChoice::Auto {
            self.device = other.device;
        }
    }

    /// Adds an occurrence; an earlier one of the same flag gives way with a warning, unless the flag accumulates.
    pub(super) fn push(&mut self, flag: &'static Flag, values: Vec<String>) {
        match self.occurrences.iter_mut().find(|o| o.flag.name() == flag.name()) {
            Some(earlier) if flag.nargs == Some(Nargs::Append) => earlier.values.extend(values),
            Some(earlier) => {
                let text = format!("{} is given more than once; the last value is used", flag.name());
                self.notices.push(Notice::Warning(text));
                earlier.values = values;
            }
            None => self.occurrences.push(Occurrence { flag, values }),
        }
    }

    /// Takes a flag of an older release or of our own. Whether a refused one ends the start is judged later.
    ///
    /// # Errors
    /// The value of one of our own flags is none that it takes.
    pub(super) fn push_legacy(&mut self, legacy: &'static LegacyFlag, value: Option<&str>) -> Result<(), CliError> {
        let LegacyFlag { flag, text, here, .. } = legacy;
        let effect = match here {
            Verdict::Refused => Effect::Refused,
            Verdict::Accepted => {
                self.notices.push(Notice::Info(format!("{flag} has no effect: {text}")));
                Effect::Accepted
            }
            Verdict::Honoured => {
                self.honour_legacy(flag, value)?;
                Effect::Honoured
            }
        };
        let text = match effect {
            Effect::Refused => format!("{flag} is gone from vLLM and not supported: {text}"),
            _ => text.clone(),
        };
        self.legacy.push(GivenFlag {
            flag: flag.clone(),
            value: value.unwrap_or_default().to_owned(),
            effect,
            text,
        });
        Ok(())
    }

    fn honour_legacy(&mut self, flag: &str, value: Option<&str>) -> Result<(), CliError> {
        let invalid = |value: &str, choices: &str| {
            CliError::Usage(format!(
                "argument {flag}: invalid choice: '{value}' (choose from {choices})"
            ))
        };
        match (flag, value.unwrap_or_default()) {
            ("--dry-run", "" | "text" | "true") => self.dry_run = Some(DryRun::Text),
            ("--dry-run", "json") => self.dry_run = Some(DryRun::Json),
            ("--dry-run", other) => return Err(invalid(other, "'text', 'json'")),
            ("--dry-run-device-memory", text) => {
                let bytes = human_int(text).map_err(|e| CliError::Usage(format!("argument {flag}: {e}")))?;
                let bytes = u64::try_from(bytes).ok().filter(|bytes| *bytes > 0);
                let not_positive = || CliError::Usage(format!("argument {flag}: {text} is not positive"));
                self.dry_run_device_memory = Some(bytes.ok_or_else(not_positive)?);
            }
            (_, "auto") => self.device = DeviceChoice::Auto,
            (_, "cpu") => self.device = DeviceChoice::Cpu,
            (_, "cuda") => self.device = DeviceChoice::Cuda,
            (_, other) => return Err(invalid(other, "'auto', 'cpu', 'cuda'")),
        }
        Ok(())
    }
}

/// What a spelling stands for.
#[derive(Clone, Copy)]
pub(super) enum Known {
    Flag {
        flag: &'static Flag,
        spelling: &'static str,
    },
    Legacy(&'static LegacyFlag),
}

/// Finds a flag by its spelling or an unambiguous beginning of it.
///
/// # Errors
/// Several flags begin so. `Ok(None)`: none does.
pub(super) fn look_up(set: &FlagSet, name: &str) -> Result<Option<Known>, CliError> {
    let name = if name.starts_with("--") {
        name.replace('_', "-")
    } else {
        name.to_owned()
    };
    if let Some(flag) = set.get(&name) {
        let spelling = flag
            .flags
            .iter()
            .find(|s| **s == name)
            .map_or(flag.name(), String::as_str);
        return Ok(Some(Known::Flag { flag, spelling }));
    }
    if let Some(legacy) = table::legacy(&name).filter(|_| set.command.runs_engine()) {
        return Ok(Some(Known::Legacy(legacy)));
    }
    if name.len() < 2 || name == "--" {
        return Ok(None);
    }
    let same_dashes = |spelling: &str| name.starts_with("--") || !spelling.starts_with("--");
    let found: Vec<_> = set
        .beginning_with(&name)
        .filter(|(spelling, _)| same_dashes(spelling))
        .collect();
    let Some(&(spelling, flag)) = found.first() else {
        return Ok(None);
    };
    let means_the_same =
        |&(s, f): &(&str, &Flag)| f.name() == flag.name() && f.bool_value(s) == flag.bool_value(spelling);
    if !found.iter().all(means_the_same) {
        let spellings: Vec<&str> = found.iter().map(|&(s, _)| s).collect();
        return Err(CliError::Usage(format!(
            "ambiguous option: {name} could match {}",
            spellings.join(", ")
        )));
    }
    Ok(Some(Known::Flag { flag, spelling }))
}

/// Reads the tokens after the subcommand.
///
/// # Errors
/// argparse's: unknown or ambiguous flags, missing values. Values themselves are read later.
pub fn normalize(set: &FlagSet, tokens: &[String]) -> Result<Normalized, CliError> {
    let mut reader = Reader {
        set,
        tokens,
        next: 0,
        dotted: Vec::new(),
        unknown: Vec::new(),
        out: Normalized::default(),
    };
    reader.run()?;
    Ok(reader.out)
}

struct Reader<'a> {
    set: &'a FlagSet,
    tokens: &'a [String],
    next: usize,
    /// Values of dotted flags, one object per flag.
    dotted: Vec<(&'static Flag, Map<String, Value>)>,
    unknown: Vec<&'a str>,
    out: Normalized,
}

impl<'a> Reader<'a> {
    fn run(&mut self) -> Result<(), CliError> {
        while let Some(token) = self.tokens.get(self.next) {
            self.next += 1;
            if token == "--" {
                self.out.positionals.extend_from_slice(&self.tokens[self.next..]);
                break;
            }
            if !self.is_flag(token) {
                self.out.positionals.push(token.clone());
                continue;
            }
            self.flag(token)?;
            if self.out.help.is_some() {
                return Ok(());
            }
        }
        if !self.unknown.is_empty() {
            return Err(CliError::Usage(format!(
                "unrecognized arguments: {}",
                self.unknown.join(" ")
            )));
        }
        for (flag, object) in std::mem::take(&mut self.dotted) {
            self.out.push(flag, vec![Value::Object(object).to_string()]);
        }
        Ok(())
    }

    fn flag(&mut self, token: &'a str) -> Result<(), CliError> {
        if let (Some(level), Some(flag)) = (token.strip_prefix("-O"), self.set.get("--optimization-level")) {
            return self.optimization_level(flag, level);
        }
        let (head, explicit) = token
            .split_once('=')
            .map_or((token, None), |(head, value)| (head, Some(value)));
        let (name, path) = head
            .split_once('.')
            .map_or((head, None), |(name, path)| (name, Some(path)));
        if let Some(path) = path {
            return self.dotted_flag(token, name, path, explicit);
        }
        match look_up(self.set, name)? {
            Some(Known::Flag { flag, spelling }) => self.known_flag(flag, spelling, explicit),
            Some(Known::Legacy(legacy)) => self.legacy_flag(legacy, explicit),
            None => {
                // `-n2`: a one-letter flag with its value attached.
                let attached = token.char_indices().nth(2).map(|(at, _)| token.split_at(at));
                match attached.and_then(|(short, value)| Some((self.set.get(short)?, value))) {
                    Some((flag, value)) => self.known_flag(flag, flag.name(), Some(value)),
                    None => {
                        self.unknown.push(token);
                        Ok(())
                    }
                }
            }
        }
    }

    fn known_flag(&mut self, flag: &'static Flag, spelling: &str, explicit: Option<&str>) -> Result<(), CliError> {
        let fail = |message: &str| Err(CliError::Usage(format!("argument {}: {message}", flag.flags.join("/"))));
        let values = match (flag.kind, flag.nargs) {
            (Kind::Help, _) => {
                self.out.help = Some(explicit.unwrap_or_default().to_owned());
                return Ok(());
            }
            (Kind::Bool | Kind::Switch, _) => {
                let given = match explicit {
                    None => true,
                    Some(text) => match parse_bool(text) {
                        Some(value) => {
                            let notice =
                                format!("{spelling} takes no value; use {spelling} or --no-{}", &spelling[2..]);
                            self.out.notices.push(Notice::Warning(notice));
                            value
                        }
                        None => return fail(&format!("ignored explicit argument '{text}'")),
                    },
                };
                vec![(given == flag.bool_value(spelling)).to_string()]
            }
            (_, Some(Nargs::Many)) => {
                let values = self.values(explicit, usize::MAX);
                if values.is_empty() {
                    return fail("expected at least one argument");
                }
                values
            }
            (_, Some(Nargs::Optional)) => self.values(explicit, 1),
            (_, Some(Nargs::Append) | None) => {
                let values = self.values(explicit, 1);
                if values.is_empty() {
                    return fail("expected one argument");
                }
                values
            }
        };
        self.out.push(flag, values);
        Ok(())
    }

    fn legacy_flag(&mut self, legacy: &'static LegacyFlag, explicit: Option<&str>) -> Result<(), CliError> {
        let values = match legacy.takes {
            Takes::None => Vec::new(),
            Takes::Explicit => explicit.map(str::to_owned).into_iter().collect(),
            Takes::One | Takes::Optional => self.values(explicit, 1),
            Takes::Many => self.values(explicit, usize::MAX),
        };
        if values.is_empty() && matches!(legacy.takes, Takes::One | Takes::Many) {
            return Err(CliError::Usage(format!(
                "argument {}: expected one argument",
                legacy.flag
            )));
        }
        self.out.push_legacy(legacy, values.first().map(String::as_str))
    }

    /// `-O3`, `-O=3`, `-O 3`.
    fn optimization_level(&mut self, flag: &'static Flag, level: &str) -> Result<(), CliError> {
        let explicit = match level.strip_prefix('=') {
            Some(value) => Some(value),
            None => (!level.is_empty()).then_some(level),
        };
        self.known_flag(flag, flag.name(), explicit)
    }

    /// `--a.b.c v`, `--a.b.c=v`, `--a.b+ v`, `--a.b+=v1,v2`.
    fn dotted_flag(&mut self, token: &'a str, name: &str, path: &str, explicit: Option<&str>) -> Result<(), CliError> {
        let flag = match look_up(self.set, name)? {
            Some(Known::Flag { flag, .. }) if matches!(flag.kind, Kind::Json | Kind::JsonOrStr) => flag,
            _ => {
                self.unknown.push(token);
                return Ok(());
            }
        };
        let fail = |message: String| CliError::Usage(format!("argument {name}.{path}: {message}"));
        let text = match explicit {
            Some(text) => text,
            None => {
                let text = self
                    .tokens
                    .get(self.next)
                    .ok_or_else(|| fail("expected one argument".into()))?;
                self.next += 1;
                text
            }
        };
        let (path, append) = path.strip_suffix('+').map_or((path, false), |path| (path, true));
        let keys: Vec<&str> = path.split('.').collect();
        if keys.iter().any(|key| key.is_empty()) || keys.len() > MAX_DOTTED_KEYS {
            return Err(fail(format!(
                "between dots stand 1 to {MAX_DOTTED_KEYS} keys, none empty"
            )));
        }
        let at = self
            .dotted
            .iter()
            .position(|(f, _)| f.name() == flag.name())
            .unwrap_or_else(|| {
                self.dotted.push((flag, Map::new()));
                self.dotted.len() - 1
            });
        let pieces = if append { text.split(',').collect() } else { vec![text] };
        for piece in pieces {
            let replaced = insert_at(&mut self.dotted[at].1, &keys, parse_dotted_value(piece), append).map_err(fail)?;
            if replaced {
                let text = format!("{name}.{path} is given more than once; the last value is used");
                self.out.notices.push(Notice::Warning(text));
            }
        }
        Ok(())
    }

    /// The explicit value, or up to `most` tokens that are no flags.
    fn values(&mut self, explicit: Option<&str>, most: usize) -> Vec<String> {
        if let Some(value) = explicit {
            return vec![value.to_owned()];
        }
        let rest = &self.tokens[self.next..];
        let count = rest
            .iter()
            .take(most)
            .take_while(|t| *t != "--" && !self.is_flag(t))
            .count();
        self.next += count;
        rest[..count].to_vec()
    }

    /// argparse's rule: a dash in front, except for `-` itself, numbers, and texts with blanks that are no known flag.
    fn is_flag(&self, token: &str) -> bool {
        let Some(rest) = token.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
            return false;
        };
        let is_number = rest.starts_with(|c: char| c.is_ascii_digit() || c == '.') && rest.parse::<f64>().is_ok();
        let head = token.split('=').next().unwrap_or(token);
        !is_number && (!token.contains(' ') || (head != token && !head.contains(' ')))
    }
}
