//! The bank's policies in the demo's state directory: put there once, yours to change.

use std::path::Path;

use ring::digest::{SHA256, digest};

use super::private;
use crate::failure::Failure;
use crate::printer::Printer;

/// The file that remembers what was put there, so that a newer binary can tell its own old copy from
/// somebody's work.
const SHIPPED: &str = ".shipped";

/// Puts the bank's policies at `directory`: if nothing is there, or only what an earlier binary put there. A repository
/// is somebody's own.
pub(super) fn install(directory: &Path, printer: &Printer) -> Result<(), Failure> {
    if is_repository(directory) {
        return Ok(());
    }
    let shipped = fingerprint(bank::POLICIES.iter().map(|(path, text)| (*path, (*text).to_owned())));
    let marker = directory.join(SHIPPED);
    if let Ok(before) = std::fs::read_to_string(&marker) {
        let now = fingerprint(
            bank::POLICIES
                .iter()
                .map(|(path, _)| (*path, std::fs::read_to_string(directory.join(path)).unwrap_or_default())),
        );
        if before == shipped || now != before {
            if now != before {
                printer.progress(&format!(
                    "the policies in {} are yours; they stay as they are",
                    directory.display()
                ));
            }
            return Ok(());
        }
    }
    for (path, text) in bank::POLICIES {
        private::write(&directory.join(path), text.as_bytes())?;
    }
    private::write(&marker, shipped.as_bytes())
}

/// Whether somebody keeps them in git: what is committed there is in force then, by control.
pub(super) fn is_repository(directory: &Path) -> bool {
    directory.join(".git").exists()
}

fn fingerprint<'a>(files: impl Iterator<Item = (&'a str, String)>) -> String {
    let all: String = files.map(|(path, text)| format!("{path}\0{}\0{text}", text.len())).collect();
    identity::jws::encode(digest(&SHA256, all.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_changed_stays_and_what_nobody_changed_is_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("policies");
        let printer = Printer::plain();
        install(&directory, &printer).unwrap();
        let (path, text) = bank::POLICIES[0];
        assert_eq!(std::fs::read_to_string(directory.join(path)).unwrap(), text);
        std::fs::write(directory.join(path), "mine").unwrap();
        install(&directory, &printer).unwrap();
        assert_eq!(std::fs::read_to_string(directory.join(path)).unwrap(), "mine");
        // An earlier binary's copy: the marker says that it was shipped just so.
        let old = fingerprint(
            bank::POLICIES
                .iter()
                .map(|(path, _)| (*path, std::fs::read_to_string(directory.join(path)).unwrap())),
        );
        std::fs::write(directory.join(SHIPPED), old).unwrap();
        install(&directory, &printer).unwrap();
        assert_eq!(std::fs::read_to_string(directory.join(path)).unwrap(), text);
    }
}
