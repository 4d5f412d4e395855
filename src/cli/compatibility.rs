//! The flags part of docs/compatibility.md, made from the table that the command line is read by.

use super::table::{Flag, TABLE, Tier, Verdict};

/// What stands before and after the generated part.
pub const BEGIN: &str = "<!-- flags: generated from src/cli/flags.json -->\n";
pub const END: &str = "<!-- end of flags -->\n";

/// Every flag of `vllm serve`, group by group, and what becomes of it.
pub fn flags_markdown() -> String {
    let mut out = String::from(BEGIN);
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
    out += "\n### Flags of older releases\n\n| flag | here | |\n|---|---|---|\n";
    for legacy in &TABLE.legacy {
        let here = match legacy.here {
            Verdict::Honoured => "better",
            Verdict::Accepted => "accepted",
            Verdict::Refused => "refused",
        };
        out += &format!("| `{}` | {here} | {} |\n", legacy.flag, cell(&legacy.text));
    }
    out + END
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
        (Verdict::Honoured, None) if flag.allow.is_some() => "in part",
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
        document::assert_current(BEGIN, END, &flags_markdown());
    }

    #[test]
    #[ignore = "writes docs/compatibility.md"]
    fn write_the_document() {
        document::write(BEGIN, END, &flags_markdown());
    }

    #[test]
    fn every_flag_has_a_row() {
        let text = flags_markdown();
        for flag in &TABLE.serve {
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
