//! `--help` and its filters, laid out as argparse does.

use super::table::{Command, Flag, FlagSet, Kind, LegacyFlag, Nargs, TABLE, Takes, Verdict};

/// Column at which texts start.
const TEXT_COLUMN: usize = 24;
const WIDTH: usize = 110;

/// What `rvllm --help` prints.
pub fn top() -> String {
    let mut out = format!(
        "{}\n\nA drop-in replacement for `vllm serve` for LFM2 models.\n\ncommands:\n",
        top_usage()
    );
    for command in Command::ALL {
        out += &format!("  {:<20} {}\n", command.path(), command.about());
    }
    out + "\n`rvllm serve demo` serves a small model that is part of the program.\n\
           `rvllm serve --help` lists the groups of flags, `rvllm serve MODEL --dry-run` says what a command line will do.\n"
}

/// The usage line of the program.
pub fn top_usage() -> String {
    let mut names: Vec<&str> = Command::ALL
        .iter()
        .map(|command| command.path().split(' ').next().unwrap_or_default())
        .collect();
    names.dedup();
    format!("usage: rvllm [-h] [-v] {{{}}} ...", names.join(","))
}

/// The usage lines before an error.
pub fn usage(command: Command) -> String {
    let positional = if command == Command::Serve { "[model_tag] " } else { "" };
    format!("usage: rvllm {} {positional}[options]", command.path())
}

/// `--help` (an empty filter: the groups), `--help=all`, `--help=<Group>` or `--help=<part of a flag>`.
///
/// # Errors
/// Nothing matches.
pub fn render(set: &FlagSet, filter: &str) -> Result<String, String> {
    let mut out = usage(set.command) + "\n";
    let path = set.command.path();
    let filter = match filter {
        "" if !set.command.runs_engine() => "all",
        filter => filter,
    };
    if filter.is_empty() {
        out += "\nGroups:\n";
        for group in set.groups() {
            let count = set.iter().filter(|f| f.group == group).count();
            out += &format!("  {group:<26}{count:>3} flags\n");
        }
        out += &format!(
            "  {OWN:<26}{:>3} flags that vLLM does not have\n",
            own_flags(set).count()
        );
        out += &format!(
            "\nFor more:\n  rvllm {path} --help=all\n  rvllm {path} --help=ModelConfig     a group\n  \
             rvllm {path} --help=max-model-len   a flag, or a part of one\n"
        );
        return Ok(out);
    }
    let wanted = filter.trim_start_matches('-').replace('_', "-").to_lowercase();
    let group = set.groups().into_iter().find(|g| g.eq_ignore_ascii_case(filter));
    let matches = |flag: &&Flag| match group {
        Some(group) => flag.group == group,
        None => wanted == "all" || flag.flags.iter().any(|spelling| spelling.contains(&wanted)),
    };
    for heading in std::iter::once("positional").chain(set.groups()) {
        let flags: Vec<&Flag> = set.iter().filter(|f| f.group == heading).filter(matches).collect();
        if !flags.is_empty() {
            out += &format!("\n{heading}:\n");
            flags.iter().for_each(|flag| out += &entry(flag));
        }
    }
    let own: Vec<&LegacyFlag> = own_flags(set)
        .filter(|flag| match group {
            Some(_) => false,
            None => filter.eq_ignore_ascii_case(OWN) || wanted == "all" || flag.flag.contains(&wanted),
        })
        .collect();
    if !own.is_empty() {
        out += &format!("\n{OWN}:\n");
        own.iter().for_each(|flag| out += &own_entry(flag));
    }
    if out.lines().count() == 1 {
        return Err(format!("no group and no flag matches --help={filter}; try --help=all"));
    }
    Ok(out)
}

/// Group of the flags that vLLM does not have.
const OWN: &str = "rvllm";

/// Honoured flags that are not in vLLM's parser; `--dry-run` and its companion are for `serve` alone.
fn own_flags(set: &FlagSet) -> impl Iterator<Item = &'static LegacyFlag> + use<> {
    let command = set.command;
    TABLE.legacy.iter().filter(move |flag| {
        let is_for = command == Command::Serve || command.runs_engine() && !flag.flag.starts_with("--dry-run");
        flag.here == Verdict::Honoured && is_for
    })
}

fn own_entry(flag: &LegacyFlag) -> String {
    let value = match flag.takes {
        Takes::None => "",
        Takes::One => " VALUE",
        Takes::Optional => " [VALUE]",
        Takes::Explicit => "[=VALUE]",
        Takes::Many => " VALUE [...]",
    };
    format!("  {}{value}\n{}", flag.flag, wrapped(&flag.text))
}

fn entry(flag: &Flag) -> String {
    let metavar = match flag.kind {
        Kind::Bool | Kind::Switch | Kind::Help => String::new(),
        _ if flag.is_positional() => String::new(),
        _ if !flag.choices.is_empty() => {
            let choices: Vec<String> = flag
                .choices
                .iter()
                .map(|c| c.as_str().map_or(c.to_string(), str::to_owned))
                .collect();
            format!(" {{{}}}", choices.join(","))
        }
        _ => format!(" {}", flag.dest().to_uppercase()),
    };
    let metavar = match flag.nargs {
        Some(Nargs::Many) => format!("{metavar} [...]"),
        Some(Nargs::Optional) if !metavar.is_empty() => format!(" [{}]", metavar.trim()),
        _ => metavar,
    };
    let verdict = match flag.here {
        Verdict::Honoured => "",
        Verdict::Accepted => "No effect: ",
        Verdict::Refused => "Not supported: ",
    };
    let default = if flag.default.is_null() {
        String::new()
    } else {
        format!(" (default: {})", flag.default)
    };
    let text = format!("{verdict}{}{default}", flag.text);
    format!("  {}{metavar}\n{}", flag.flags.join(", "), wrapped(&text))
}

/// A text in its column, broken into lines.
fn wrapped(text: &str) -> String {
    let mut out = String::new();
    let mut line = " ".repeat(TEXT_COLUMN - 1);
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            out += line.trim_end();
            out.push('\n');
            line = " ".repeat(TEXT_COLUMN - 1);
        }
        line.push(' ');
        line += word;
    }
    out + &line + "\n"
}
