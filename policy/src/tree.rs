//! A policies directory, on disk or in memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::problem::{Problem, Problems};

/// Largest single file: ten thousand policies take three megabytes.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Where the files are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tree<'a> {
    root: &'a Path,
    /// By their names below the root, with `/`; without, they are on disk.
    files: Option<&'a BTreeMap<String, Vec<u8>>>,
}

/// A file, read once: what was checked is what decides.
pub(crate) struct TextFile {
    pub(crate) path: PathBuf,
    /// Below the policies directory, with `/`.
    pub(crate) name: String,
    pub(crate) text: String,
}

/// What a directory holds.
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    pub(crate) name: String,
    pub(crate) is_dir: bool,
}

impl<'a> Tree<'a> {
    pub(crate) fn on_disk(root: &'a Path) -> Self {
        Self { root, files: None }
    }

    /// `root` stands before the names in problems.
    pub(crate) fn in_memory(root: &'a Path, files: &'a BTreeMap<String, Vec<u8>>) -> Self {
        Self { root, files: Some(files) }
    }

    pub(crate) fn root(&self) -> &'a Path {
        self.root
    }

    /// A path's name below the root.
    fn name(&self, path: &Path) -> String {
        let relative = path.strip_prefix(self.root).unwrap_or(path);
        relative.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
    }

    pub(crate) fn is_dir(&self, path: &Path) -> bool {
        match self.files {
            None => path.is_dir(),
            Some(files) => below(files, &self.name(path)).next().is_some(),
        }
    }

    /// What a directory holds, by name, without hidden files and Markdown.
    pub(crate) fn entries(&self, dir: &Path, problems: &mut Problems) -> Vec<Found> {
        let mut found = match self.files {
            None => listed(dir, problems),
            Some(files) => {
                let mut parts: BTreeMap<&str, bool> = BTreeMap::new();
                for rest in below(files, &self.name(dir)) {
                    let (name, is_dir) = rest.split_once('/').map_or((rest, false), |(name, _)| (name, true));
                    *parts.entry(name).or_default() |= is_dir;
                }
                let entry = |(name, is_dir): (&str, bool)| Found {
                    path: dir.join(name),
                    name: name.to_owned(),
                    is_dir,
                };
                parts.into_iter().map(entry).collect()
            }
        };
        found.retain(|Found { name, .. }| {
            !name.starts_with('.') && !name.to_ascii_lowercase().ends_with(".md")
        });
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    pub(crate) fn read(&self, path: &Path, problems: &mut Problems) -> TextFile {
        let name = self.name(path);
        let text = match self.files {
            None => match fs::metadata(path).map(|data| data.len()) {
                Ok(size) if size > MAX_FILE_BYTES => Err(format!("larger than {MAX_FILE_BYTES} bytes")),
                _ => fs::read(path).map_err(|error| format!("cannot be read: {error}")),
            },
            Some(files) => files.get(&name).cloned().ok_or_else(|| "is missing".to_owned()),
        };
        let text =
            text.and_then(|bytes| String::from_utf8(bytes).map_err(|error| format!("is not UTF-8: {error}")));
        let text = text.unwrap_or_else(|message| {
            problems.push(Problem::file(path, message));
            String::new()
        });
        TextFile { path: path.to_owned(), name, text }
    }
}

/// The names below a directory, each without the directory's own.
fn below<'a>(files: &'a BTreeMap<String, Vec<u8>>, dir: &str) -> impl Iterator<Item = &'a str> {
    let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
    files.keys().filter_map(move |name| name.strip_prefix(prefix.as_str()))
}

fn listed(dir: &Path, problems: &mut Problems) -> Vec<Found> {
    let listing = fs::read_dir(dir).and_then(|listing| listing.collect::<Result<Vec<_>, _>>());
    match listing {
        Ok(listing) => listing
            .into_iter()
            .map(|entry| {
                let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
                Found { is_dir: path.is_dir(), path, name }
            })
            .collect(),
        Err(error) => {
            problems.push(Problem::file(dir, format!("cannot be read: {error}")));
            Vec::new()
        }
    }
}
