//! Why a verb ended without doing what it was asked, told for a person.

use std::error::Error;
use std::process::ExitCode;

use policy::Problem;

/// What the exit code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok,
    /// It was tried and did not work.
    Failed,
    /// The command line is not one.
    Usage,
    /// This user may not.
    Denied,
    /// A file that was read is wrong.
    Invalid,
    /// It ended as asked, and connections were cut.
    Cut,
    /// `palisade run` failed by itself: it is no answer of its command.
    NotCommand,
    /// The exit code of a command that was run.
    Command(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Ok => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Denied => 3,
            Exit::Invalid => 4,
            Exit::Cut => 5,
            Exit::NotCommand => 125,
            Exit::Command(code) => code,
        })
    }
}

/// One failure: what did not work, why, what to do about it, and what to run then.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
    /// The chain of causes, outermost first.
    pub(crate) causes: Vec<String>,
    /// Mistakes in files, each with its place.
    pub(crate) problems: Vec<Problem>,
    pub(crate) hint: Option<Box<str>>,
    /// A command to run next.
    pub(crate) next: Option<Box<str>>,
}

impl Failure {
    /// Something that was tried and did not work.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            exit: Exit::Failed,
            message: message.into(),
            causes: Vec::new(),
            problems: Vec::new(),
            hint: None,
            next: None,
        }
    }

    /// A command line that asks for the impossible.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, ..Self::new(message) }
    }

    /// Input that is wrong, as a whole.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self { exit: Exit::Invalid, ..Self::new(message) }
    }

    /// Mistakes in `what`, a file or a directory.
    pub(crate) fn problems(what: &str, problems: Vec<Problem>) -> Self {
        let count = match problems.len() {
            1 => "a problem".to_owned(),
            n => format!("{n} problems"),
        };
        Self { problems, ..Self::invalid(format!("{what} has {count}")) }
    }

    /// Adds why, with the causes of the cause.
    pub(crate) fn because(mut self, cause: &dyn Error) -> Self {
        let mut next = Some(cause);
        while let Some(cause) = next {
            let text = cause.to_string();
            // Some errors end with their source's own words: said once is enough.
            if !self.causes.last().is_some_and(|above| above.ends_with(&text)) {
                self.causes.push(text);
            }
            next = cause.source();
        }
        self
    }

    /// Adds what to do about it.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into().into_boxed_str());
        self
    }

    /// Adds the command to run next.
    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into().into_boxed_str());
        self
    }
}
