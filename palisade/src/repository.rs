//! A git repository that control follows, by the git program: a mirror of one branch in control's state.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ca::policies::Files;
use identity::clock::SharedClock;
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::mesh::PolicySource;

/// Longest wait for git: a first fetch of a large repository.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Bytes of policies taken from one commit, and of anything else that git says.
const MAX_BYTES: u64 = 64 << 20;
/// Files of one commit.
const MAX_FILES: usize = 20_000;

/// Why nothing can be taken from the repository. `Display` is a sentence for operators.
#[derive(Debug, Error)]
pub(crate) enum RepositoryError {
    /// The program.
    #[error("git cannot be started: {0}")]
    Start(#[source] std::io::Error),
    /// It failed.
    #[error("git {what} failed: {said}")]
    Git {
        /// Which of its commands.
        what: &'static str,
        /// Its own words.
        said: String,
    },
    /// It takes too long.
    #[error("git {0} took longer than {TIMEOUT:?}")]
    Timeout(&'static str),
    /// What it says is not what this version knows, or too much.
    #[error("git {0} said something else than expected, or too much")]
    Answer(&'static str),
    /// No signature, or not of one who may.
    #[error("the commit {commit} is not signed by one of {}: {said}", signers.display())]
    Unsigned {
        /// Which.
        commit: String,
        /// Who may.
        signers: PathBuf,
        /// Git's own words.
        said: String,
    },
    /// A part of the tree that is no file.
    #[error("{0} is a link or a submodule, which policies are not")]
    NoFile(String),
}

/// The mirror.
#[derive(Debug)]
pub(crate) struct Repository {
    source: PolicySource,
    mirror: PathBuf,
    clock: SharedClock,
}

impl Repository {
    /// A mirror of what `source` names, below the directory `state`.
    pub(crate) fn new(source: PolicySource, state: &Path, clock: SharedClock) -> Self {
        Self { source, mirror: state.join("policies.git"), clock }
    }

    /// The newest commit of the branch, fetched.
    pub(crate) async fn head(&self) -> Result<String, RepositoryError> {
        if !self.mirror.join("HEAD").exists() {
            self.git("init", &["init", "--quiet", "--bare", &self.mirror.display().to_string()], None)
                .await?;
        }
        let branch = format!("refs/heads/{}", self.source.branch);
        let to = format!("+{branch}:{branch}");
        let fetch = ["fetch", "--quiet", "--no-tags", "--", &self.source.repository, &to];
        self.git("fetch", &fetch, None).await?;
        let commit = format!("{branch}^{{commit}}");
        let said = self.git("rev-parse", &["rev-parse", "--verify", &commit], None).await?;
        let hash = String::from_utf8_lossy(&said).trim().to_owned();
        let good = hash.len() >= 40 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        if good { Ok(hash) } else { Err(RepositoryError::Answer("rev-parse")) }
    }

    /// That a commit is signed by one who may, where that is asked for.
    pub(crate) async fn check_signature(&self, commit: &str) -> Result<(), RepositoryError> {
        let Some(signers) = &self.source.allowed_signers else { return Ok(()) };
        let file = format!("gpg.ssh.allowedSignersFile={}", signers.display());
        let verify = ["-c", "gpg.format=ssh", "-c", &file, "verify-commit", commit];
        match self.git("verify-commit", &verify, None).await {
            Ok(_) => Ok(()),
            Err(RepositoryError::Git { said, .. }) => Err(RepositoryError::Unsigned {
                commit: commit.to_owned(),
                signers: signers.clone(),
                said: if said.is_empty() { "there is no signature".to_owned() } else { said },
            }),
            Err(error) => Err(error),
        }
    }

    /// The files of the policies directory in a commit.
    pub(crate) async fn files(&self, commit: &str) -> Result<Files, RepositoryError> {
        let directory = self.source.directory.trim_matches('/');
        let directory = if directory == "." { "" } else { directory };
        let tree = format!("{commit}:{directory}");
        let listed = self.git("ls-tree", &["ls-tree", "-r", "-z", "--full-tree", &tree], None).await?;
        let listed = String::from_utf8(listed).map_err(|_| RepositoryError::Answer("ls-tree"))?;
        let mut names = BTreeMap::new();
        for line in listed.split_terminator('\0') {
            let answer = || RepositoryError::Answer("ls-tree");
            let (about, name) = line.split_once('\t').ok_or_else(answer)?;
            let [mode, kind, hash] = about.split(' ').collect::<Vec<_>>()[..] else { return Err(answer()) };
            if kind != "blob" || !mode.starts_with("100") {
                return Err(RepositoryError::NoFile(name.to_owned()));
            }
            names.insert(name.to_owned(), hash.to_owned());
            if names.len() > MAX_FILES {
                return Err(answer());
            }
        }
        let wanted: String = names.values().map(|hash| format!("{hash}\n")).collect();
        let batch = self.git("cat-file", &["cat-file", "--batch"], Some(wanted.into_bytes())).await?;
        contents(names, &batch).ok_or(RepositoryError::Answer("cat-file"))
    }

    async fn git(
        &self,
        what: &'static str,
        args: &[&str],
        input: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, RepositoryError> {
        let mut command = Command::new("git");
        if what != "init" {
            command.arg("--git-dir").arg(&self.mirror);
        }
        command.args(["-c", "core.hooksPath=/dev/null"]).args(args);
        // Nobody is there to be asked for a password. Who names a program for SSH, with a key of the repository's, knows.
        command.env("GIT_TERMINAL_PROMPT", "0");
        if std::env::var_os("GIT_SSH_COMMAND").is_none() {
            command.env("GIT_SSH_COMMAND", "ssh -o BatchMode=yes");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(RepositoryError::Start)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let say = async {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // One that ends early says why.
                let _ended = stdin.write_all(&input).await.is_err();
            }
        };
        let talk = async {
            let (mut said, mut complained) = (Vec::new(), Vec::new());
            let hear = async {
                match stdout {
                    Some(stdout) => stdout.take(MAX_BYTES + 1).read_to_end(&mut said).await,
                    None => Ok(0),
                }
            };
            let hear_complaints = async {
                match stderr {
                    Some(stderr) => stderr.take(MAX_BYTES).read_to_end(&mut complained).await,
                    None => Ok(0),
                }
            };
            let ((), heard, complaints) = tokio::join!(say, hear, hear_complaints);
            heard.and(complaints).map_err(RepositoryError::Start)?;
            let status = child.wait().await.map_err(RepositoryError::Start)?;
            Ok((status, said, complained))
        };
        let (status, said, complained) = tokio::select! {
            talked = talk => talked?,
            () = self.clock.sleep(TIMEOUT) => return Err(RepositoryError::Timeout(what)),
        };
        if said.len() as u64 > MAX_BYTES {
            return Err(RepositoryError::Answer(what));
        }
        if status.success() {
            return Ok(said);
        }
        let words = String::from_utf8_lossy(&complained).split_whitespace().collect::<Vec<_>>().join(" ");
        Err(RepositoryError::Git { what, said: words })
    }
}

/// What `git cat-file --batch` says to the hashes of `names`, in their order.
fn contents(names: BTreeMap<String, String>, batch: &[u8]) -> Option<Files> {
    let (mut files, mut rest) = (Files::new(), batch);
    for (name, hash) in names {
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let (head, after) = rest.split_at_checked(end + 1)?;
        let head = std::str::from_utf8(head).ok()?.trim_end();
        let size: usize = head.strip_prefix(&hash)?.strip_prefix(" blob ")?.parse().ok()?;
        let (content, after) = after.split_at_checked(size)?;
        files.insert(name, content.to_vec());
        rest = after.strip_prefix(b"\n")?;
    }
    rest.is_empty().then_some(files)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use identity::SystemClock;

    use super::*;

    fn sh(directory: &Path, script: &str) {
        let output = std::process::Command::new("sh").args(["-ec", script]).current_dir(directory).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A repository, and a mirror of it.
    fn setting(allowed_signers: bool) -> (tempfile::TempDir, Repository) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        sh(
            path,
            "git init -q -b main work && cd work && git config user.name a && git config user.email a@bank.example
             mkdir -p policies/services/web && echo one > policies/mesh.cedarschema
             printf 'no end of line' > policies/services/web/web.cedar && echo other > README.md
             git add . && git commit -qm first
             ssh-keygen -q -t ed25519 -N '' -f ../key && ssh-keygen -q -t ed25519 -N '' -f ../strange
             echo \"a@bank.example $(cat ../key.pub)\" > ../signers",
        );
        let source = PolicySource {
            repository: path.join("work").display().to_string(),
            branch: "main".into(),
            directory: "policies".into(),
            allowed_signers: allowed_signers.then(|| path.join("signers")),
            every: Duration::from_secs(1),
        };
        let repository = Repository::new(source, path, SystemClock::shared());
        (folder, repository)
    }

    fn commit(folder: &tempfile::TempDir, change: &str, more: &str) {
        let script = format!("cd work && {change} && git add . && git {more} commit -qm next");
        sh(folder.path(), &script);
    }

    #[tokio::test]
    async fn what_is_committed_is_what_is_read() {
        let (folder, repository) = setting(false);
        let first = repository.head().await.unwrap();
        let files = repository.files(&first).await.unwrap();
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        assert_eq!(names, ["mesh.cedarschema", "services/web/web.cedar"]);
        assert_eq!(files["services/web/web.cedar"], b"no end of line");
        // What is only in the work tree is nothing yet.
        fs::write(folder.path().join("work/policies/mesh.cedarschema"), "two").unwrap();
        assert_eq!(repository.head().await.unwrap(), first);
        commit(&folder, "true", "");
        let second = repository.head().await.unwrap();
        assert_ne!(second, first);
        assert_eq!(repository.files(&second).await.unwrap()["mesh.cedarschema"], b"two");
        repository.check_signature(&second).await.unwrap();
        // History that is written anew is followed, too.
        sh(folder.path(), "cd work && git reset -q --hard HEAD~1");
        assert_eq!(repository.head().await.unwrap(), first);
        commit(&folder, "ln -s /etc/passwd policies/link", "");
        let linked = repository.head().await.unwrap();
        let error = repository.files(&linked).await.unwrap_err();
        assert!(matches!(&error, RepositoryError::NoFile(name) if name == "link"), "{error}");
        commit(&folder, "git rm -q -r policies", "");
        let gone = repository.head().await.unwrap();
        assert!(repository.files(&gone).await.unwrap_err().to_string().contains("ls-tree"));
        sh(folder.path(), "mv work elsewhere");
        let error = repository.head().await.unwrap_err().to_string();
        assert!(error.starts_with("git fetch failed: "), "{error}");
    }

    #[tokio::test]
    async fn policy_39_unsigned_commits_are_refused_where_signatures_are_asked_for() {
        let (folder, repository) = setting(true);
        let unsigned = repository.head().await.unwrap();
        let error = repository.check_signature(&unsigned).await.unwrap_err().to_string();
        assert!(
            error.contains("is not signed by one of") && error.ends_with("there is no signature"),
            "{error}"
        );
        let by = |key: &str| format!("-c gpg.format=ssh -c user.signingkey=../{key} -c commit.gpgsign=true");
        commit(&folder, "echo 2 > policies/mesh.cedarschema", &by("strange"));
        let strange = repository.head().await.unwrap();
        assert!(matches!(repository.check_signature(&strange).await, Err(RepositoryError::Unsigned { .. })));
        commit(&folder, "echo 3 > policies/mesh.cedarschema", &by("key"));
        let signed = repository.head().await.unwrap();
        repository.check_signature(&signed).await.unwrap();
    }

    #[test]
    fn what_git_says_is_taken_whole_or_not_at_all() {
        let names = || BTreeMap::from([("a".to_owned(), "11".to_owned()), ("b".to_owned(), "22".to_owned())]);
        let good = b"11 blob 2\nx\n\n22 blob 0\n\n";
        assert_eq!(contents(names(), good).unwrap()["a"], b"x\n");
        for bad in [
            &b""[..],
            b"11 blob 2\nx\n\n",
            b"11 blob 2\nx\n\n22 missing\n",
            b"22 blob 2\nx\n\n11 blob 0\n\n",
            b"11 blob 9\nx\n\n22 blob 0\n\n",
            b"11 blob 2\nx\n\n22 blob 0\n\nmore",
        ] {
            assert_eq!(contents(names(), bad), None, "{:?}", String::from_utf8_lossy(bad));
        }
    }
}
