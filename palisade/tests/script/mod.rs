//! Programs in Python, as independent clients and apps.

#![allow(dead_code, reason = "not every test program that shares this file needs all of it")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use crate::stage::DEADLINE;

/// A Python program, and what it says.
pub(crate) struct Script {
    child: Child,
    said: Receiver<String>,
}

impl Script {
    /// Starts `tests/PATH`, which needs `module` of the package of that name; `None`, with the reason printed, where
    /// it cannot run.
    pub(crate) fn start(path: &str, module: &str, args: &[&str]) -> Option<Self> {
        let package = module.split('.').next().unwrap_or(module);
        let found = Command::new("python3").args(["-c", &format!("import {module}")]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            identity::testing::skip(&format!("python3 cannot import {module} (pip install {package})"));
            return None;
        }
        let mut command = Command::new("python3");
        let mut child = command
            .arg(tests().join(path))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, said) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Some(Self { child, said })
    }

    /// The next line that it says.
    #[track_caller]
    pub(crate) fn says(&self) -> String {
        self.said.recv_timeout(DEADLINE).unwrap_or_else(|error| panic!("it says nothing: {error}"))
    }

    /// Gives it a line to read.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Everything that it says until it has ended, well.
    #[track_caller]
    pub(crate) fn ends(mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Ok(line) = self.said.recv_timeout(DEADLINE) {
            all.push(line);
        }
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {all:#?}");
        all
    }

    /// What it has said that nobody heard, once it is ended from here.
    pub(crate) fn ends_now(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.said.iter().collect()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _gone = self.child.kill().is_err();
        let _reaped = self.child.wait().is_ok();
    }
}

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}
