//! The programs that speak to the kernel for us, in the network namespace that was asked for.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::failure::{Exit, Failure};

/// Where Debian, Fedora and Alpine keep administrators' programs; `su` without `-` leaves them out of PATH.
const ADMINISTRATORS_PROGRAMS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];
/// Where `ip netns` keeps what it named.
const NAMED_NAMESPACES: &str = "/run/netns";

/// One network namespace and the programs that change it.
#[derive(Debug)]
pub(super) struct Host {
    /// Entered by `nsenter`; `None` is the namespace this process is in.
    netns: Option<PathBuf>,
    nft: PathBuf,
    ip: PathBuf,
}

/// A program ran, and would not.
#[derive(Debug)]
pub(super) struct Refused {
    /// What it wrote to standard error.
    pub(super) said: String,
}

impl Refused {
    /// What could not be done, with the program's own words.
    pub(super) fn failure(&self, what: &str) -> Failure {
        let because = std::io::Error::other(self.said.clone());
        let failure = Failure::new(what).because(&because);
        if self.is_permission() {
            let hint = "it takes CAP_NET_ADMIN in that network namespace: run it as root";
            return Failure { exit: Exit::Denied, ..failure }.hint(hint);
        }
        failure
    }

    pub(super) fn is_permission(&self) -> bool {
        self.said.contains("Operation not permitted")
    }
}

impl Host {
    /// Finds the programs and the namespace.
    pub(super) fn open(netns: Option<&str>) -> Result<Self, Failure> {
        let netns = netns.map(namespace).transpose()?;
        Ok(Self { netns, nft: find("nft", "nftables")?, ip: find("ip", "iproute2")? })
    }

    /// Runs `nft` with `input` on its standard input.
    pub(super) fn nft(&self, args: &[&str], input: &str) -> Result<Result<String, Refused>, Failure> {
        self.run(&self.nft, args, input)
    }

    /// Runs `ip`.
    pub(super) fn ip(&self, args: &[&str]) -> Result<Result<String, Refused>, Failure> {
        self.run(&self.ip, args, "")
    }

    /// How `nft` lists table `name` of `rules` once they are loaded: loaded in a network namespace that ends
    /// with the question, so that nothing here changes.
    pub(super) fn listing_of(&self, rules: &str, name: &str) -> Result<Result<String, Refused>, Failure> {
        let unshare = find("unshare", "util-linux")?;
        let script = r#""$0" -f - && exec "$0" -s list table inet "$1""#;
        let mut command = Command::new(unshare);
        command.args(["--net", "sh", "-c", script]).arg(&self.nft).arg(name);
        finish(command, rules)
    }

    fn run(&self, program: &Path, args: &[&str], input: &str) -> Result<Result<String, Refused>, Failure> {
        let mut command = match &self.netns {
            None => Command::new(program),
            Some(netns) => {
                let mut command = Command::new(find("nsenter", "util-linux")?);
                let mut enter = std::ffi::OsString::from("--net=");
                enter.push(netns);
                command.arg(enter).arg("--").arg(program);
                command
            }
        };
        command.args(args);
        finish(command, input)
    }
}

fn finish(mut command: Command, input: &str) -> Result<Result<String, Refused>, Failure> {
    let name = command.get_program().to_string_lossy().into_owned();
    let failed = |error: &std::io::Error| Failure::new(format!("cannot run {name}")).because(error);
    let mut child = command
        // Answers are read by program: in the language that they were written for.
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(&error))?;
    // The rules are a few KiB, within what a pipe holds: writing them waits for nobody.
    if let Some(mut stdin) = child.stdin.take()
        && let Err(error) = stdin.write_all(input.as_bytes())
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        return Err(failed(&error));
    }
    let output = child.wait_with_output().map_err(|error| failed(&error))?;
    if output.status.success() {
        return Ok(Ok(String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let said = if said.is_empty() { format!("{name} ended with {}", output.status) } else { said };
    Ok(Err(Refused { said }))
}

fn namespace(wanted: &str) -> Result<PathBuf, Failure> {
    let path =
        if wanted.contains('/') { PathBuf::from(wanted) } else { Path::new(NAMED_NAMESPACES).join(wanted) };
    match path.try_exists() {
        Ok(true) => Ok(path),
        Ok(false) => Err(Failure::usage(format!("there is no network namespace {}", path.display()))
            .hint("`ip netns list` lists those with a name; /proc/PID/ns/net is that of a process")),
        Err(error) => Err(Failure::new(format!("cannot look for {}", path.display())).because(&error)),
    }
}

fn find(program: &str, package: &str) -> Result<PathBuf, Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    find_in(program, &path, &ADMINISTRATORS_PROGRAMS).ok_or_else(|| {
        Failure::new(format!("the program `{program}` is not installed, and capture works by it"))
            .hint(format!("it is in the package `{package}` (apt install {package}, dnf install {package})"))
    })
}

fn find_in(program: &str, path: &OsStr, also: &[&str]) -> Option<PathBuf> {
    let directories = std::env::split_paths(path).filter(|directory| directory.is_absolute());
    directories
        .chain(also.iter().map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_path_and_where_administrators_keep_theirs() {
        let here = tempfile::tempdir().unwrap();
        let program = here.path().join("nft");
        assert_eq!(find_in("nft", OsStr::new("/nowhere"), &[]), None);
        std::fs::write(&program, "").unwrap();
        assert_eq!(find_in("nft", here.path().as_os_str(), &[]), Some(program.clone()));
        let also = here.path().to_str().unwrap();
        assert_eq!(find_in("nft", OsStr::new("/nowhere"), &[also]), Some(program));
        // An empty or relative entry means "wherever I am": not where root's programs are to come from.
        assert_eq!(find_in("Cargo.toml", OsStr::new(":.:"), &[]), None);
    }

    #[test]
    fn a_program_that_is_missing_is_named_with_its_package() {
        let failure = find("palisade-no-such-program", "nftables").unwrap_err();
        assert!(failure.message.contains("`palisade-no-such-program` is not installed"), "{failure:?}");
        assert!(failure.hint.unwrap().contains("apt install nftables"));
    }

    #[test]
    fn a_namespace_that_is_not_there_is_a_mistake_of_usage() {
        assert_eq!(namespace("no-such-namespace").unwrap_err().exit, Exit::Usage);
        assert_eq!(namespace("/proc/self/ns/net").unwrap(), Path::new("/proc/self/ns/net"));
    }
}
