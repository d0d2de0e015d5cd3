//! Runs `palisade` as a person would and compares the whole of what it prints with `tests/expected/NAME.txt`.
//!
//! Run with `UPDATE_EXPECTED=1` to write the files anew, and read the diff.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Bounds a hang, which is a verb that serves although it should have refused.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// Where commands run, and what of their output differs from run to run.
pub(crate) struct Place {
    directory: PathBuf,
    /// What is replaced by what, in this order.
    replaced: Vec<(String, String)>,
}

impl Place {
    /// Commands run in `directory`, which they print as HERE.
    pub(crate) fn new(directory: &Path) -> Self {
        let here = (directory.display().to_string(), "HERE".to_owned());
        Self { directory: directory.to_owned(), replaced: vec![here] }
    }

    /// Shows `text` as `word`.
    #[allow(dead_code, reason = "not every test program that shares this file has something to hide")]
    pub(crate) fn hiding(mut self, text: impl ToString, word: &str) -> Self {
        self.replaced.push((text.to_string(), word.to_owned()));
        self
    }

    /// The command line, the exit code and what went to the two streams, as one text.
    pub(crate) fn shown(&self, args: &[&str]) -> String {
        let child = Command::new(env!("CARGO_BIN_EXE_palisade"))
            .args(args)
            .current_dir(&self.directory)
            .env("NO_COLOR", "1")
            .env_remove("CREDENTIALS_DIRECTORY")
            .env_remove("SPIFFE_ENDPOINT_SOCKET")
            .env_remove("RUST_LOG")
            .env_remove("COLUMNS")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || done.send(child.wait_with_output()));
        let Ok(output) = ended.recv_timeout(ENDS_WITHIN) else {
            let _killed = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
            panic!("`palisade {}` does not end", args.join(" "));
        };
        let output = output.unwrap();
        let text = |bytes: Vec<u8>| self.hide(&String::from_utf8(bytes).unwrap());
        format!(
            "$ palisade {}\nexit code {}\n-- standard output\n{}-- standard error\n{}",
            args.join(" "),
            output.status.code().map_or_else(|| "none".to_owned(), |code| code.to_string()),
            text(output.stdout),
            text(output.stderr)
        )
    }

    /// Without log lines, which tell the time, and with the names of this run replaced.
    fn hide(&self, text: &str) -> String {
        let lines = text.lines().filter(|line| !line.starts_with("{\"timestamp\":"));
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        self.replaced.iter().fold(text, |text, (from, to)| text.replace(from, to))
    }

    /// Runs the command and compares.
    #[track_caller]
    pub(crate) fn expect(&self, name: &str, args: &[&str]) {
        let seen = self.shown(args);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/expected/{name}.txt"));
        if std::env::var_os("UPDATE_EXPECTED").is_some() {
            std::fs::write(&path, &seen).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(seen == expected, "{} differs from what is printed now:\n{seen}", path.display());
    }
}
