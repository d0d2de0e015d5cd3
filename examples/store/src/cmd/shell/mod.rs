//! `palisade-store shell`: a small command language for people, and for scripts that people write.

mod language;
mod print;
mod session;

use std::{
    io::{self, BufRead as _, IsTerminal as _},
    process::ExitCode,
};

use anyhow::Context as _;
use rustyline::{DefaultEditor, error::ReadlineError};
use store_client::Client;

use session::{Failure, Next, Session};

/// What `palisade-store shell` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Some nodes; the others are found where those say. Or all by number, 1=HOST:PORT,2=HOST:PORT,…: they are asked
    /// there and nowhere else, as is needed behind a sidecar.
    #[arg(long, value_name = "[NUMBER=]HOST:PORT,…", value_delimiter = ',', required = true)]
    nodes: Vec<String>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = Client::connect(args.nodes)?;
    let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
    let code = runtime.block_on(async {
        if io::stdin().is_terminal() { attend(client).await } else { script(client).await }
    });
    runtime.shutdown_background();
    code
}

/// Commands from a terminal, until somebody ends it.
pub(crate) async fn attend(client: Client) -> anyhow::Result<ExitCode> {
    let mut session = Session::new(client, io::stdout());
    let mut editor = DefaultEditor::new().context("the terminal")?;
    println!("help shows what there is");
    loop {
        let prompt = if session.is_open() { "store*> " } else { "store> " };
        // Keys are waited for on a thread of their own: signals and nodes go on meanwhile.
        let (line, used) = tokio::task::spawn_blocking(move || {
            let line = editor.readline(prompt);
            (line, editor)
        })
        .await
        .context("the terminal")?;
        editor = used;
        let line = match line {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error).context("the terminal"),
        };
        // A line that cannot be remembered is done all the same.
        let _remembered = editor.add_history_entry(line.as_str());
        match session.line(&line).await {
            Ok(Next::Line) => {}
            Ok(Next::End) => break,
            Err(failure) => complain(&failure),
        }
    }
    session.end().await;
    Ok(ExitCode::SUCCESS)
}

async fn script(client: Client) -> anyhow::Result<ExitCode> {
    Ok(match run_commands(client).await? {
        Ran::Nothing | Ran::All => ExitCode::SUCCESS,
        Ran::Failed => ExitCode::FAILURE,
    })
}

/// What became of commands from standard input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    /// There were none.
    Nothing,
    /// All were done.
    All,
    /// One failed, which has been said, and those after it were not begun.
    Failed,
}

/// Commands from standard input, up to its end or the first that fails.
pub(crate) async fn run_commands(client: Client) -> anyhow::Result<Ran> {
    let mut session = Session::new(client, io::stdout());
    let mut lines = 0;
    loop {
        let line = tokio::task::spawn_blocking(|| io::stdin().lock().lines().next());
        let Some(line) = line.await.context("standard input")?.transpose().context("standard input")? else {
            break;
        };
        lines += 1;
        match session.line(&line).await {
            Ok(Next::Line) => {}
            Ok(Next::End) => break,
            Err(failure) => {
                eprintln!("line {lines}: {line}");
                complain(&failure);
                session.end().await;
                return Ok(Ran::Failed);
            }
        }
    }
    session.end().await;
    Ok(if lines == 0 { Ran::Nothing } else { Ran::All })
}

fn complain(failure: &Failure) {
    eprintln!("error: {failure}");
    if let Some(hint) = failure.hint() {
        eprintln!("hint: {hint}");
    }
}
