//! What is wrong with a file that a person wrote: where, why, and what to try.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode, SourceSpan};

/// How alike two words must be (Jaro-Winkler, 0 to 1) before one is offered in place of the other.
const SUGGESTION_SIMILARITY: f64 = 0.75;

/// One thing wrong with a file.
///
/// `Display` is `file:line:column: message` and, if there is one, a line `  hint: …`. It is also a
/// [`miette::Diagnostic`], so that a terminal can show the source line with a caret.
#[derive(Debug, Clone)]
pub struct Problem {
    /// The file, as it was named when it was read.
    pub file: PathBuf,
    /// Line, from 1; 0 if the problem is the file as a whole (missing, unreadable).
    pub line: usize,
    /// Column in characters, from 1; 0 with line 0.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    span: Range<usize>,
    source: Option<Arc<NamedSource<String>>>,
}

impl Problem {
    /// A problem at a byte range of a file's text. A range outside the text is moved to its end.
    pub fn at(file: &Path, text: &str, span: Range<usize>, message: impl Into<String>) -> Self {
        let start = floor_boundary(text, span.start);
        let end = floor_boundary(text, span.end).max(start);
        let (line, column) = line_and_column(text, start);
        let source = NamedSource::new(file.display().to_string(), text.to_owned());
        Self {
            file: file.to_owned(),
            line,
            column,
            message: message.into(),
            hint: None,
            span: start..end,
            source: Some(Arc::new(source)),
        }
    }

    /// A problem with a file as a whole.
    pub fn file(file: &Path, message: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            line: 0,
            column: 0,
            message: message.into(),
            hint: None,
            span: 0..0,
            source: None,
        }
    }

    /// The same problem with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same problem with a hint if there is one to give.
    #[must_use]
    pub fn maybe_hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint.or(self.hint);
        self
    }

    /// What the `toml` crate found wrong with `text`; for an unknown key, the nearest known one is offered.
    pub fn toml(file: &Path, text: &str, error: &toml::de::Error) -> Self {
        let problem = match error.span() {
            Some(span) => Self::at(file, text, span, error.message()),
            None => Self::file(file, error.message()),
        };
        problem.maybe_hint(hint_for_unknown(error.message()))
    }

    /// What Cedar found wrong with `text`: its first label is the place, its help the hint.
    pub(crate) fn cedar(file: &Path, text: &str, error: &dyn Diagnostic) -> Self {
        let label = error.labels().and_then(|mut labels| labels.next());
        // Cedar says the same thing twice for a syntax error: `unexpected token` and the label's detail.
        let detail = label.as_ref().and_then(|l| l.label()).map(str::to_owned);
        let help = error.help().map(|help| help.to_string()).or(detail);
        let problem = match label {
            Some(label) => {
                let start = label.offset();
                Self::at(file, text, start..start.saturating_add(label.len()), error.to_string())
            }
            None => Self::file(file, error.to_string()),
        };
        problem.maybe_hint(help)
    }
}

/// serde's words for an unknown key, read back to offer the nearest known one.
fn hint_for_unknown(message: &str) -> Option<String> {
    let rest =
        message.strip_prefix("unknown field `").or_else(|| message.strip_prefix("unknown variant `"))?;
    let (word, expected) = rest.split_once('`')?;
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    suggest(word, known)
}

/// `did you mean …?` for a word that is not among those known.
pub fn suggest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let similarity = |candidate: &str| strsim::jaro_winkler(&word.to_lowercase(), &candidate.to_lowercase());
    let (nearest, score) =
        known.into_iter().map(|k| (k, similarity(k))).max_by(|(_, a), (_, b)| a.total_cmp(b))?;
    (score >= SUGGESTION_SIMILARITY).then(|| format!("did you mean `{nearest}`?"))
}

fn floor_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

/// Line and column (in characters) of a byte offset, both from 1.
pub(crate) fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..floor_boundary(text, offset)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    (line, column)
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        write!(f, ": {}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Problem {}

/// How miette sees a problem: its message alone, because place and hint are drawn by the report.
#[derive(Debug)]
struct Drawn(Problem);

impl fmt::Display for Drawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.source {
            Some(_) => f.write_str(&self.0.message),
            None => write!(f, "{}: {}", self.0.file.display(), self.0.message),
        }
    }
}

impl std::error::Error for Drawn {}

impl Diagnostic for Drawn {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.0.hint.as_ref().map(|hint| Box::new(hint) as Box<dyn fmt::Display>)
    }
    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.0.source.as_deref().map(|source| source as &dyn SourceCode)
    }
    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        self.0.source.as_ref()?;
        let span = SourceSpan::from(self.0.span.clone());
        Some(Box::new(std::iter::once(LabeledSpan::new_with_span(None, span))))
    }
}

impl Problem {
    /// The problem as a report with the source line and a caret.
    pub fn report(&self) -> miette::Report {
        miette::Report::new(Drawn(self.clone()))
    }
}

/// Everything wrong that was found, in the order of the files. Never empty as an error.
#[derive(Debug, Clone, Default)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    pub(crate) fn push(&mut self, problem: Problem) {
        self.0.push(problem);
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_message_and_hint_are_shown_in_one_form() {
        let text = "a = 1\n  öb = 2\n";
        let problem = Problem::at(Path::new("map.toml"), text, 10..11, "unknown key `b`").hint("drop it");
        assert_eq!(problem.to_string(), "map.toml:2:4: unknown key `b`\n  hint: drop it");
        let missing = Problem::file(Path::new("x.cedar"), "no such file");
        assert_eq!(missing.to_string(), "x.cedar: no such file");
    }

    #[test]
    fn a_span_outside_the_text_is_moved_inside() {
        let problem = Problem::at(Path::new("f"), "ä", 1..99, "m");
        assert_eq!((problem.line, problem.column), (1, 1));
        let end = Problem::at(Path::new("f"), "ab\n", 50..60, "m");
        assert_eq!((end.line, end.column), (2, 1));
    }

    #[test]
    fn serde_messages_of_unknown_keys_get_a_suggestion() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code, reason = "only its error is looked at")]
        struct Control {
            listen: String,
            state: String,
        }
        let text = "listne = 'x'\n";
        let error = toml::from_str::<Control>(text).unwrap_err();
        let problem = Problem::toml(Path::new("mesh.toml"), text, &error);
        assert_eq!((problem.line, problem.column), (1, 1));
        assert_eq!(problem.hint.as_deref(), Some("did you mean `listen`?"));
    }

    #[test]
    fn a_report_shows_the_line_and_a_caret() {
        let problem =
            Problem::at(Path::new("map.toml"), "a = 1\nbad = 2\n", 6..9, "unknown key").hint("drop it");
        let drawn = format!("{:?}", problem.report());
        assert!(
            drawn.contains("bad = 2") && drawn.contains("map.toml") && drawn.contains("drop it"),
            "{drawn}"
        );
    }
}
