//! The one gate for output: data on standard output, everything else on standard error.
//!
//! Colour repeats what the words say and never replaces them.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use miette::{GraphicalReportHandler, GraphicalTheme};
use owo_colors::OwoColorize as _;
use policy::Problem;

use crate::failure::{Exit, Failure};

/// How this process may write.
#[derive(Debug, Clone)]
pub(crate) struct Printer {
    /// `NO_COLOR` is not set.
    wanted: bool,
    /// Standard error is a terminal whose reader wants colour.
    colour: bool,
    /// Standard error is a terminal, so a line may be rewritten.
    live: bool,
}

impl Printer {
    /// Looks at the terminal and at `NO_COLOR`.
    pub(crate) fn new() -> Self {
        let live = std::io::stderr().is_terminal();
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { wanted, colour: live && wanted, live }
    }

    /// A printer that writes plain lines, for tests.
    #[cfg(test)]
    pub(crate) fn plain() -> Self {
        Self { wanted: false, colour: false, live: false }
    }

    /// Whether progress may be drawn over itself.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// Whether what goes to standard output may be coloured.
    pub(crate) fn colours_data(&self) -> bool {
        self.wanted && std::io::stdout().is_terminal()
    }

    /// Writes what was asked for to standard output.
    pub(crate) fn data(&self, text: &str) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            // `palisade config show | head` is not a failure.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) => Err(Failure::new("cannot write to standard output").because(&error)),
            Ok(()) => Ok(()),
        }
    }

    /// Writes one line about what is going on to standard error.
    pub(crate) fn progress(&self, line: &str) {
        // With standard error closed there is nobody to tell, and the work goes on.
        let _closed = writeln!(std::io::stderr().lock(), "{line}").is_err();
    }

    /// Writes a warning to standard error.
    pub(crate) fn warning(&self, text: &str) {
        let word = if self.colour { "warning".yellow().bold().to_string() } else { "warning".to_owned() };
        self.progress(&format!("{word}: {text}"));
    }

    /// Writes a failure to standard error, and gives the exit code that goes with it.
    pub(crate) fn failure(&self, failure: &Failure) -> Exit {
        self.progress(&self.render(failure));
        failure.exit
    }

    fn render(&self, failure: &Failure) -> String {
        let mut text = String::new();
        for problem in &failure.problems {
            for line in self.problem(problem).trim_start_matches('\n').lines() {
                text.push_str(line.trim_end());
                text.push('\n');
            }
            text.push('\n');
        }
        let word = if self.colour { "error".red().bold().to_string() } else { "error".to_owned() };
        text.push_str(&format!("{word}: {}", failure.message));
        for cause in &failure.causes {
            // A cause may be a drawing of several lines: it stays one, further in.
            let cause = cause.trim_end().replace('\n', "\n           ");
            text.push_str(&format!("\n  because: {cause}"));
        }
        if let Some(hint) = &failure.hint {
            text.push_str(&format!("\n  hint: {hint}"));
        }
        if let Some(next) = &failure.next {
            text.push_str(&format!("\n  next: {next}"));
        }
        text
    }

    fn problem(&self, problem: &Problem) -> String {
        let theme = if self.colour { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
        let handler = GraphicalReportHandler::new_themed(theme).with_wrap_lines(false).with_context_lines(1);
        let mut drawn = String::new();
        match handler.render_report(&mut drawn, problem.report().as_ref()) {
            Ok(()) => drawn,
            // Writing to a string does not fail; should it, the plain form says the same.
            Err(_) => problem.to_string(),
        }
    }
}

/// Shows what clap has to say: help and version on standard output, a mistake on standard error.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    // clap writes to the right one of the two itself, and knows about colour.
    let _closed = error.print().is_err();
    if error.use_stderr() { Exit::Usage.into() } else { Exit::Ok.into() }
}

/// Rows under headings, in columns as wide as their widest cell; the last column is not padded.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(headings.get(column).map(|heading| heading.chars().count())).max().unwrap_or(0)
    };
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells
            .iter()
            .enumerate()
            .map(|(column, cell)| {
                let fill = width(column).saturating_sub(cell.chars().count());
                if column + 1 == cells.len() {
                    (*cell).to_owned()
                } else {
                    format!("{cell}{}", " ".repeat(fill))
                }
            })
            .collect();
        format!("  {}\n", padded.join("  ").trim_end())
    };
    let head = line(headings.to_vec());
    rows.iter().map(|row| line(row.iter().map(String::as_str).collect())).fold(head, |text, row| text + &row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![
            vec!["gateway".to_owned(), "https://127.0.0.1:8443".to_owned(), "log in here".to_owned()],
            vec!["idp".to_owned(), "–".to_owned(), String::new()],
        ];
        let expected = "  role     address                 what\n  \
                        gateway  https://127.0.0.1:8443  log in here\n  \
                        idp      –\n";
        assert_eq!(table(&["role", "address", "what"], &rows), expected);
    }

    #[test]
    fn a_failure_names_the_place_the_cause_the_hint_and_the_next_step() {
        let problem =
            Problem::at(std::path::Path::new("m.toml"), "a = 1\n", 0..1, "unknown key `a`").hint("drop it");
        let failure = Failure::problems("m.toml", vec![problem])
            .because(&std::io::Error::other("cause"))
            .hint("do this")
            .next("palisade config check m.toml");
        let text = Printer::plain().render(&failure);
        assert_eq!(
            text,
            "  × unknown key `a`\n   ╭─[m.toml:1:1]\n 1 │ a = 1\n   · ─\n   ╰────\n  help: drop it\n\n\
             error: m.toml has a problem\n  because: cause\n  hint: do this\n  next: palisade config check m.toml"
        );
    }
}
