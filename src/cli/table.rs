//! Every flag vLLM 0.33 has, as data: spelling, type, default, and what becomes of it here.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::Value;

/// How a value is read; vLLM's argparse types.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Help,
    /// `--x` / `--no-x`.
    Bool,
    /// `--x` only.
    Switch,
    Str,
    Int,
    Float,
    /// `inf` = null: no bound.
    FloatOrInf,
    /// `1k` = 1000, `1K` = 1024, … up to T.
    HumanInt,
    /// As above, or `auto` = -1.
    HumanIntOrAuto,
    Json,
    /// JSON if it starts like an object, else the string.
    JsonOrStr,
}

/// argparse's `nargs`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Nargs {
    /// An optional value.
    #[serde(rename = "?")]
    Optional,
    /// One or more values after one flag.
    #[serde(rename = "+")]
    Many,
    /// One value per flag, accumulating.
    #[serde(rename = "append")]
    Append,
}

/// How much of the flag vLLM's users need: the class of the compatibility data.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    Core,
    Accept,
    Reject,
}

/// What this server does with it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Does what it does in vLLM, except for values outside `allow` where that is given.
    Honoured,
    /// Taken and logged; no effect.
    Accepted,
    /// Start fails when it is set to anything but the default or a value of `allow`.
    Refused,
}

#[derive(Debug, Deserialize)]
pub struct Flag {
    /// Every spelling; the first long one names the flag.
    pub flags: Vec<String>,
    /// Group of `--help`.
    pub group: String,
    /// Subcommands that have it ([`Command::path`]); none for a flag of `serve`.
    #[serde(default)]
    pub commands: Vec<String>,
    #[serde(rename = "type")]
    pub kind: Kind,
    /// `""` and `None` mean null.
    #[serde(default)]
    pub optional: bool,
    pub nargs: Option<Nargs>,
    #[serde(default)]
    pub default: Value,
    #[serde(default)]
    pub choices: Vec<Value>,
    pub tier: Tier,
    pub here: Verdict,
    /// Values besides the default that are not refused.
    pub allow: Option<Vec<Value>>,
    /// Honoured: what it does. Accepted: why it has no effect. Refused: what to do instead.
    pub text: String,
    /// Why values outside `allow` are refused.
    pub otherwise: Option<String>,
    /// Where this server does more than vLLM.
    pub better: Option<String>,
    /// Honoured, but not all that vLLM does by it; `text` tells what.
    #[serde(default)]
    pub in_part: bool,
}

impl Flag {
    /// argparse's `dest`: the first long spelling with underscores.
    pub fn dest(&self) -> String {
        self.name().trim_start_matches('-').replace('-', "_")
    }

    /// The first long spelling; the positional's name.
    pub fn name(&self) -> &str {
        self.flags
            .iter()
            .find(|f| f.starts_with("--"))
            .unwrap_or(&self.flags[0])
    }

    pub fn is_positional(&self) -> bool {
        !self.flags[0].starts_with('-')
    }

    pub fn is_list(&self) -> bool {
        matches!(self.nargs, Some(Nargs::Many | Nargs::Append))
    }

    /// What `spelling` sets a boolean flag to: the first spelling's opposite for `--no-x`, and for `--disable-x` of an
    /// `--enable-x` (and the reverse).
    pub fn bool_value(&self, spelling: &str) -> bool {
        let negates = |prefix: &str, of: &str| {
            spelling
                .strip_prefix(prefix)
                .is_some_and(|rest| self.name().strip_prefix(of) == Some(rest))
        };
        !(negates("--no-", "--") || negates("--disable-", "--enable-") || negates("--enable-", "--disable-"))
    }
}

/// How many values a flag of older releases took.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Takes {
    None,
    One,
    Optional,
    /// Only one written behind `=`.
    Explicit,
    Many,
}

/// A flag of older vLLM releases, or our own. Not abbreviable.
#[derive(Debug, Deserialize)]
pub struct LegacyFlag {
    pub flag: String,
    pub takes: Takes,
    pub here: Verdict,
    pub text: String,
}

#[derive(Debug, Deserialize)]
pub struct Table {
    pub serve: Vec<Flag>,
    pub legacy: Vec<LegacyFlag>,
}

/// The flags of `serve`.
pub static TABLE: LazyLock<Table> =
    LazyLock::new(|| serde_json::from_str(include_str!("flags.json")).expect("flags.json is checked by tests"));

/// The flags that the other subcommands have of their own.
pub static SUBCOMMAND_FLAGS: LazyLock<Vec<Flag>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("subcommands.json")).expect("subcommands.json is checked by tests")
});

/// The subcommands that read flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Serve,
    Chat,
    Complete,
    BenchLatency,
    BenchThroughput,
    BenchStartup,
    BenchServe,
    RunBatch,
    CollectEnv,
}

impl Command {
    pub const ALL: [Command; 9] = [
        Command::Serve,
        Command::Chat,
        Command::Complete,
        Command::BenchLatency,
        Command::BenchThroughput,
        Command::BenchStartup,
        Command::BenchServe,
        Command::RunBatch,
        Command::CollectEnv,
    ];

    /// As it is typed.
    pub fn path(self) -> &'static str {
        match self {
            Command::Serve => "serve",
            Command::Chat => "chat",
            Command::Complete => "complete",
            Command::BenchLatency => "bench latency",
            Command::BenchThroughput => "bench throughput",
            Command::BenchStartup => "bench startup",
            Command::BenchServe => "bench serve",
            Command::RunBatch => "run-batch",
            Command::CollectEnv => "collect-env",
        }
    }

    /// A line for `rvllm --help`.
    pub fn about(self) -> &'static str {
        match self {
            Command::Serve => "Serve a model over HTTP.",
            Command::Chat => "Talk to a running server.",
            Command::Complete => "Have a running server continue a text.",
            Command::BenchLatency => "Time one batch, in process.",
            Command::BenchThroughput => "Tokens per second over many prompts, in process.",
            Command::BenchStartup => "Time the start, cold and warm, phase by phase.",
            Command::BenchServe => "Put load on a running server.",
            Command::RunBatch => "Answer an OpenAI batch file.",
            Command::CollectEnv => "Print what a bug report needs.",
        }
    }

    /// It runs the engine, and so has every flag of `serve`.
    pub fn runs_engine(self) -> bool {
        match self {
            Command::Serve
            | Command::BenchLatency
            | Command::BenchThroughput
            | Command::BenchStartup
            | Command::RunBatch => true,
            Command::Chat | Command::Complete | Command::BenchServe | Command::CollectEnv => false,
        }
    }
}

/// The flags of one subcommand, found by spelling.
pub struct FlagSet {
    pub command: Command,
    flags: Vec<&'static Flag>,
    by_spelling: HashMap<&'static str, &'static Flag>,
}

impl FlagSet {
    /// Own flags, and those of `serve` where the subcommand runs the engine. An own flag stands for one of `serve` that is
    /// spelled the same.
    pub fn new(command: Command) -> Self {
        let own: Vec<&'static Flag> = SUBCOMMAND_FLAGS
            .iter()
            .filter(|f| f.commands.iter().any(|c| c == command.path()))
            .collect();
        let is_own = |flag: &Flag| own.iter().any(|o| o.flags.iter().any(|s| flag.flags.contains(s)));
        let of_serve = TABLE.serve.iter().filter(|f| match command.runs_engine() {
            true => !is_own(f),
            false => f.kind == Kind::Help,
        });
        let flags: Vec<&'static Flag> = of_serve.chain(own.iter().copied()).collect();
        let by_spelling = flags
            .iter()
            .flat_map(|&f| f.flags.iter().map(move |s| (s.as_str(), f)))
            .collect();
        Self {
            command,
            flags,
            by_spelling,
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &'static Flag> + '_ {
        self.flags.iter().copied()
    }

    pub fn get(&self, spelling: &str) -> Option<&'static Flag> {
        self.by_spelling.get(spelling).copied()
    }

    /// Spellings that begin with `prefix`, in the table's order.
    pub fn beginning_with<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'static str, &'static Flag)> + 'a {
        self.iter().flat_map(move |f| {
            f.flags
                .iter()
                .filter(move |s| s.starts_with(prefix))
                .map(move |s| (s.as_str(), f))
        })
    }

    /// Groups in the table's order.
    pub fn groups(&self) -> Vec<&'static str> {
        let mut groups: Vec<&str> = Vec::new();
        for flag in self.iter().filter(|f| !f.is_positional()) {
            if !groups.contains(&flag.group.as_str()) {
                groups.push(&flag.group);
            }
        }
        groups
    }
}

/// A flag of an older release.
pub fn legacy(spelling: &str) -> Option<&'static LegacyFlag> {
    TABLE.legacy.iter().find(|l| l.flag == spelling)
}
