//! The part of docs/compatibility.md on flags and environment variables, made from the tables that they are read by.

use super::table::{Command, Flag, SUBCOMMAND_FLAGS, TABLE, Tier, Verdict};
use crate::config::environment::{self, VariableUse};

/// What stands before and after the generated part.
pub const BEGIN: &str = "<!-- flags: generated from src/cli/flags.json -->\n";
pub const END: &str = "<!-- end of flags -->\n";

/// Every flag and every environment variable, and what becomes of it.
pub fn markdown() -> String {
    [
        BEGIN,
        &serve_markdown(),
        &subcommands_markdown(),
        &variables_markdown(),
        END,
    ]
    .concat()
}

/// Every flag of `vllm serve`, group by group.
fn serve_markdown() -> String {
    let mut out = String::new();
    out += "## Flags of `vllm serve`\n\n";
    let count = |tier: Tier, verdict: Verdict| {
        TABLE
            .serve
            .iter()
            .filter(|f| f.tier == tier && f.here == verdict)
            .count()
    };
    out += &format!(
        "{} flags of vLLM {}. Same: as in vLLM. Better: as in vLLM, and more. In part: for the values named. Accepted: \
         logged, no effect. Refused: the server does not start when it is set to anything but its default. Of the {} flags that matter most, {} are \
         honoured, {} have nothing to act on and {} are refused for now.\n",
        TABLE.serve.len(),
        crate::config::VLLM_VERSION,
        TABLE.serve.iter().filter(|f| f.tier == Tier::Core).count(),
        count(Tier::Core, Verdict::Honoured),
        count(Tier::Core, Verdict::Accepted),
        count(Tier::Core, Verdict::Refused),
    );
    let mut group = "";
    for flag in &TABLE.serve {
        if flag.group != group {
            group = &flag.group;
            out += &format!("\n### {group}\n\n| flag | default | here | |\n|---|---|---|---|\n");
        }
        out += &row(flag);
    }
    out += "\n### Our own flags, and those of older releases\n\n| flag | here | |\n|---|---|---|\n";
    for legacy in &TABLE.legacy {
        let here = match legacy.here {
            Verdict::Honoured => "better",
            Verdict::Accepted => "accepted",
            Verdict::Refused => "refused",
        };
        out += &format!("| `{}` | {here} | {} |\n", legacy.flag, cell(&legacy.text));
    }
    out
}

/// What the other subcommands have beside, or in place of, the flags of `serve`.
fn subcommands_markdown() -> String {
    let mut out = String::from("\n## Flags of the other subcommands\n");
    for command in Command::ALL.into_iter().filter(|command| *command != Command::Serve) {
        let also = match command.runs_engine() {
            true => " Also every flag of `serve`.",
            false => "",
        };
        out += &format!("\n### `{}`\n\n{}{also}\n", command.path(), command.about());
        let own = SUBCOMMAND_FLAGS
            .iter()
            .filter(|f| f.commands.iter().any(|c| c == command.path()));
        let rows: String = own.map(row).collect();
        if !rows.is_empty() {
            out += &format!("\n| flag | default | here | |\n|---|---|---|---|\n{rows}");
        }
    }
    out
}

/// Every environment variable of vLLM, and the others that matter.
fn variables_markdown() -> String {
    let mut out = String::from("\n## Environment variables\n\n| variable | here | |\n|---|---|---|\n");
    for variable in environment::variables() {
        let here = match variable.here {
            VariableUse::Honoured => "same",
            VariableUse::Accepted => "no effect",
            VariableUse::Refused => "refused",
        };
        out += &format!("| `{}` | {here} | {} |\n", variable.name, cell(&variable.text));
    }
    let others: Vec<String> = environment::without_effect().map(|name| format!("`{name}`")).collect();
    out + &format!(
        "\nOne line in the log names the variables that are set and have no effect, another those that vLLM does not know \
         (with --fail-on-environ-validation they end the start). Without effect, because the part of vLLM that they tune does \
         not exist here: {}.\n",
        others.join(", ")
    )
}

fn row(flag: &Flag) -> String {
    let spellings: Vec<String> = flag.flags.iter().map(|s| format!("`{s}`")).collect();
    let default = if flag.default.is_null() {
        String::new()
    } else {
        format!("`{}`", flag.default)
    };
    let mut text = flag.text.clone();
    let here = match (flag.here, &flag.better) {
        (Verdict::Honoured, Some(better)) => {
            text += &format!(" Here: {better}.");
            "better"
        }
        (Verdict::Honoured, None) if flag.in_part || flag.allow.is_some() => "in part",
        (Verdict::Honoured, None) => "same",
        (Verdict::Accepted, _) => "accepted",
        (Verdict::Refused, _) => "refused",
    };
    let allowed: Vec<String> = flag.allow.iter().flatten().map(|v| format!("`{v}`")).collect();
    match (&flag.otherwise, flag.here) {
        (Some(otherwise), _) => text += &format!(" Only the default and {}: {otherwise}.", allowed.join(", ")),
        (None, Verdict::Refused) if !allowed.is_empty() => text += &format!(" (taken: {})", allowed.join(", ")),
        _ => {}
    }
    format!(
        "| {} | {} | {here} | {} |\n",
        spellings.join(" "),
        cell(&default),
        cell(&text)
    )
}

/// A table cell's text: bars would end it.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::document;

    #[test]
    fn the_document_is_up_to_date() {
        document::assert_current(BEGIN, END, &markdown());
    }

    #[test]
    #[ignore = "writes docs/compatibility.md"]
    fn write_the_document() {
        document::write(BEGIN, END, &markdown());
    }

    #[test]
    fn every_flag_has_a_row() {
        let text = markdown();
        for flag in TABLE.serve.iter().chain(SUBCOMMAND_FLAGS.iter()) {
            assert!(
                flag.flags
                    .iter()
                    .all(|spelling| text.contains(&format!("`{spelling}`"))),
                "{}",
                flag.name()
            );
        }
        assert!(
            TABLE
                .legacy
                .iter()
                .all(|legacy| text.contains(&format!("| `{}` |", legacy.flag)))
        );
    }
}
