//! What is shown while the demo starts: one line a role, rewritten on a terminal, plain elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::printer::Printer;

/// How often the marks of waiting lines turn.
const TURN_EVERY: Duration = Duration::from_millis(100);

/// The lines of a start.
pub(crate) struct Progress {
    printer: Printer,
    /// `None` where standard error is no terminal.
    lines: Option<MultiProgress>,
    bars: BTreeMap<String, ProgressBar>,
}

impl Progress {
    pub(crate) fn new(printer: &Printer) -> Self {
        let lines = printer.is_live().then(MultiProgress::new);
        Self { printer: printer.clone(), lines, bars: BTreeMap::new() }
    }

    /// `role` is being started.
    pub(crate) fn starting(&mut self, role: &str) {
        let Some(lines) = &self.lines else {
            self.printer.progress(&format!("starting {role}"));
            return;
        };
        let bar = self.bars.entry(role.to_owned()).or_insert_with(|| lines.add(ProgressBar::new_spinner()));
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar.set_message(format!("{role}: starting"));
        bar.enable_steady_tick(TURN_EVERY);
    }

    /// `role` is ready, `after` it was started.
    pub(crate) fn ready(&mut self, role: &str, after: Duration) {
        let text = format!("{role}: ready after {} ms", after.as_millis());
        match self.bars.remove(role) {
            Some(bar) => {
                bar.disable_steady_tick();
                if let Ok(style) = ProgressStyle::with_template("  {msg}") {
                    bar.set_style(style);
                }
                bar.finish_with_message(text);
            }
            None => self.printer.progress(&text),
        }
    }

    /// Something to be read that is not the progress of one role.
    pub(crate) fn say(&self, text: &str) {
        match &self.lines {
            // Above the lines, so that they stay whole.
            Some(lines) => lines.suspend(|| self.printer.progress(text)),
            None => self.printer.progress(text),
        }
    }

    /// Takes the lines away.
    pub(crate) fn end(self) {
        if let Some(lines) = &self.lines {
            // A terminal that went away shows nothing either way.
            let _gone = lines.clear().is_err();
        }
    }
}
