//! PostgreSQL beside it: one unreplicated server, SERIALIZABLE, every commit synced, driven by its own `pgbench`.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use rustix::process::{Signal, geteuid};

use super::{
    load::{Measured, ROWS, VALUE_BYTES, Work},
    peer::{Guarded, find},
};

/// Where Debian has what is not in the path.
const DEBIAN: &str = "/usr/lib/postgresql/15/bin";
/// How long a server has to start.
const START: Duration = Duration::from_secs(30);

/// A server with its rows.
#[derive(Debug)]
pub(crate) struct Postgres {
    directory: PathBuf,
    /// What it says that it is.
    pub(crate) version: String,
    _server: Guarded,
}

impl Postgres {
    /// Starts one in `directory`, as somebody else than root, who it does not run as.
    ///
    /// # Errors
    ///
    /// When it is not installed or does not start.
    pub(crate) fn start(directory: &Path) -> anyhow::Result<Self> {
        let directory = directory.join("postgres");
        std::fs::create_dir_all(&directory).context("no directory for PostgreSQL")?;
        if geteuid().is_root() {
            run(Command::new("chown").arg("postgres").arg(&directory))?;
        }
        let data = directory.join("data");
        let superuser = ["--username=bench", "--auth=trust", "--no-instructions", "--pgdata"];
        run(program("initdb")?.args(superuser).arg(&data))?;
        let mut command = program("postgres")?;
        command.arg("-D").arg(&data).arg("-k").arg(&directory);
        for setting in ["listen_addresses=", "fsync=on", "synchronous_commit=on", "shared_buffers=256MB"] {
            command.args(["-c", setting]);
        }
        command.args(["-c", "default_transaction_isolation=serializable"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().context("PostgreSQL cannot be started")?;
        // An immediate shutdown: what is in it is not needed again.
        let server = Guarded::ended_by(child, Signal::QUIT);
        let version = run(program("postgres")?.arg("--version"))?;
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        let version = version.split(' ').nth(2).unwrap_or_default().trim().to_owned();
        let postgres = Self { directory, version, _server: server };
        postgres.load()?;
        Ok(postgres)
    }

    fn load(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        while let Err(error) = self.psql("SELECT 1") {
            if began.elapsed() > START {
                return Err(error.context("PostgreSQL does not start"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.psql("CREATE TABLE rows (id int PRIMARY KEY, value text NOT NULL)")?;
        let last = ROWS - 1;
        self.psql(&format!(
            "INSERT INTO rows SELECT id, repeat('.', {VALUE_BYTES}) FROM generate_series(0, {last}) id"
        ))?;
        self.psql("VACUUM ANALYZE rows").map(drop)
    }

    fn psql(&self, statement: &str) -> anyhow::Result<Output> {
        let mut command = self.client("psql")?;
        run(command.args(["-q", "-c", statement, "postgres"]))
    }

    fn client(&self, name: &str) -> anyhow::Result<Command> {
        let mut command = program(name)?;
        command.arg("-h").arg(&self.directory).args(["-U", "bench"]).current_dir(&self.directory);
        Ok(command)
    }

    /// Lets so many clients do it for so long, or says nothing of what it has no equal of.
    ///
    /// # Errors
    ///
    /// When `pgbench` fails.
    pub(crate) fn measure(
        &self,
        work: Work,
        clients: usize,
        time: Duration,
    ) -> anyhow::Result<Option<Measured>> {
        let scripts = scripts(work);
        if scripts.is_empty() {
            return Ok(None);
        }
        let seconds = time.as_secs().max(1);
        let mut command = self.client("pgbench")?;
        command.args([
            "--no-vacuum",
            "--protocol=prepared",
            "--max-tries=1000",
            "--log",
            "--log-prefix=times",
        ]);
        command.arg(format!("--client={clients}")).arg("--jobs=1").arg(format!("--time={seconds}"));
        for (name, weight, text) in &scripts {
            let file = self.directory.join(name);
            std::fs::write(&file, text).context("a script for pgbench cannot be written")?;
            command.arg(format!("--file={}@{weight}", file.display()));
        }
        let output = run(command.arg("postgres"))?;
        let micros = self.times()?;
        let failures = failures(&String::from_utf8_lossy(&output.stdout));
        let seconds = f64::from(u32::try_from(seconds).unwrap_or(u32::MAX));
        Ok(Some(Measured { micros, seconds, failures, failure: None }))
    }

    /// Reads how long each transaction took, and forgets it.
    fn times(&self) -> anyhow::Result<Vec<u64>> {
        let mut micros = Vec::new();
        for entry in std::fs::read_dir(&self.directory).context("pgbench's times")? {
            let path = entry.context("pgbench's times")?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("times.")) {
                let text = std::fs::read_to_string(&path).context("pgbench's times")?;
                // Client, count, microseconds; a failure has a word in their place.
                micros.extend(text.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok()));
                std::fs::remove_file(&path).context("pgbench's times")?;
            }
        }
        Ok(micros)
    }
}

fn failures(report: &str) -> u64 {
    let line = report.lines().find_map(|line| line.strip_prefix("number of failed transactions: "));
    line.and_then(|line| line.split(' ').next()?.parse().ok()).unwrap_or(0)
}

/// What is run for it: a file's name, a weight, and what is in the file.
fn scripts(work: Work) -> Vec<(&'static str, u64, String)> {
    let any = format!("\\set id random(0, {})\n", ROWS - 1);
    let half = ROWS / 2;
    let filler = format!("lpad(:new::text, {VALUE_BYTES}, '.')");
    let new = "\\set new random(0, 1000000000)\n";
    let read = |id: &str| format!("SELECT value FROM rows WHERE id = {id};\n");
    let write = |id: &str| format!("UPDATE rows SET value = {filler} WHERE id = {id};\n");
    let blind = format!("{any}{new}{}", write(":id"));
    let point = format!("{any}{}", read(":id"));
    match work {
        Work::BlindWrite => vec![("blind.sql", 1, blind)],
        Work::ReadModifyWrite => {
            vec![("modify.sql", 1, format!("{any}{new}BEGIN;\n{}{}COMMIT;\n", read(":id"), write(":id")))]
        }
        Work::Transfer => {
            let other = format!("\\set other (:id + {half}) % {ROWS}\n");
            let reads = read(":id") + &read(":other");
            let writes = write(":id") + &write(":other");
            vec![("transfer.sql", 1, format!("{any}{other}{new}BEGIN;\n{reads}{writes}COMMIT;\n"))]
        }
        Work::StrongRead => vec![("point.sql", 1, point)],
        Work::StaleRead => Vec::new(),
        Work::Mix => vec![("point.sql", 9, point), ("blind.sql", 1, blind)],
    }
}

/// One of its programs, as somebody who is not root.
fn program(name: &str) -> anyhow::Result<Command> {
    let path = find(name, &[DEBIAN])
        .ok_or_else(|| anyhow!("{name} is not installed; apt-get install postgresql"))?;
    if !geteuid().is_root() {
        return Ok(Command::new(path));
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(path);
    Ok(command)
}

fn run(command: &mut Command) -> anyhow::Result<Output> {
    let output = command.output().with_context(|| format!("{command:?} cannot be run"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_reads_two_rows_and_writes_them() {
        let scripts = scripts(Work::Transfer);
        let text = &scripts[0].2;
        assert_eq!(text.matches("SELECT").count(), 2);
        assert_eq!(text.matches("UPDATE").count(), 2);
        assert!(text.ends_with("COMMIT;\n"));
    }

    #[test]
    fn failures_are_read_from_the_report() {
        assert_eq!(failures("x\nnumber of failed transactions: 12 (0.1%)\n"), 12);
        assert_eq!(failures(""), 0);
    }
}
