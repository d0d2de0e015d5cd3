//! What was measured, for people and for programs.

use serde_json::{Value, json};

use super::load::{Measured, Work};

/// One system doing one thing with so many clients.
#[derive(Debug)]
pub(crate) struct Cell {
    /// What.
    pub(crate) work: Work,
    /// By how many.
    pub(crate) clients: usize,
    /// Which.
    pub(crate) system: String,
    /// How it went.
    pub(crate) measured: Measured,
}

/// Everything that was measured in a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// In the order of measuring.
    pub(crate) cells: Vec<Cell>,
    /// From a leader's death to the next acknowledged commit, in seconds, by system.
    pub(crate) recoveries: Vec<(String, Vec<f64>)>,
    /// Of what commits had to wait for their timestamps, so much was hidden behind replication.
    pub(crate) hidden_percent: Vec<(&'static str, u64)>,
    /// What was left out, and why.
    pub(crate) left_out: Vec<String>,
}

impl Report {
    /// Another round of a cell, which may be its first.
    pub(crate) fn add(&mut self, work: Work, clients: usize, system: &str, measured: Measured) {
        let same = |cell: &&mut Cell| cell.work == work && cell.clients == clients && cell.system == system;
        match self.cells.iter_mut().find(same) {
            Some(cell) => cell.measured.add(measured),
            None => self.cells.push(Cell { work, clients, system: system.to_owned(), measured }),
        }
    }

    /// The table.
    pub(crate) fn print(&self) {
        for work in Work::ALL {
            let cells: Vec<_> = self.cells.iter().filter(|cell| cell.work == work).collect();
            if cells.is_empty() {
                continue;
            }
            println!("\n{}", work.name());
            println!(
                "{:>8}  {:<18}{:>10}{:>10}{:>10}  ours is",
                "clients", "", "a second", "p50 ms", "p99 ms"
            );
            for cell in cells {
                println!("{}", self.line(cell));
            }
        }
        if !self.hidden_percent.is_empty() {
            println!("\nof what commits wait for their timestamps to pass, hidden behind replication");
        }
        for (what, percent) in &self.hidden_percent {
            println!("  {what:<30}{percent:>4} %");
        }
        if !self.recoveries.is_empty() {
            println!("\nfrom a leader's death to the next acknowledged write");
        }
        for (system, seconds) in &self.recoveries {
            let (median, most) = median_and_most(seconds);
            println!("  {system:<18} median {median:.2} s, longest of {} {most:.2} s", seconds.len());
        }
        for reason in &self.left_out {
            println!("\nleft out: {reason}");
        }
    }

    fn line(&self, cell: &Cell) -> String {
        let Cell { clients, system, measured, .. } = cell;
        let (rate, p50, p99) = (measured.rate(), measured.percentile(50), measured.percentile(99));
        let mut line = format!("{clients:>8}  {system:<18}{rate:>10.0}{p50:>10.2}{p99:>10.2}");
        if let Some(ours) = self.ours(cell) {
            line.push_str(&format!("  {:.2} × as many", ours / rate.max(f64::MIN_POSITIVE)));
        }
        if measured.failures > 0 {
            let why = measured.failure.as_deref().unwrap_or("it says not why");
            line.push_str(&format!("  {} failed: {why}", measured.failures));
        }
        line
    }

    /// What we make of what somebody else did.
    fn ours(&self, cell: &Cell) -> Option<f64> {
        let ours = self.cells.first().map(|cell| cell.system.as_str())?;
        let same =
            |other: &&Cell| other.work == cell.work && other.clients == cell.clients && other.system == ours;
        (cell.system != ours).then(|| self.cells.iter().find(same).map(|cell| cell.measured.rate())).flatten()
    }

    /// The same for programs.
    pub(crate) fn to_json(&self) -> Value {
        let cell = |cell: &Cell| {
            json!({
                "work": cell.work.name(),
                "clients": cell.clients,
                "system": cell.system,
                "per_second": cell.measured.rate(),
                "p50_ms": cell.measured.percentile(50),
                "p99_ms": cell.measured.percentile(99),
                "failed": cell.measured.failures,
            })
        };
        let recoveries: Vec<_> = self
            .recoveries
            .iter()
            .map(|(system, seconds)| json!({"system": system, "seconds": seconds}))
            .collect();
        let hidden: Vec<_> = self
            .hidden_percent
            .iter()
            .map(|(what, percent)| json!({"work": what, "hidden_percent": percent}))
            .collect();
        json!({
            "cells": self.cells.iter().map(cell).collect::<Vec<_>>(),
            "recoveries": recoveries,
            "commit_wait": hidden,
            "left_out": self.left_out,
        })
    }
}

fn median_and_most(seconds: &[f64]) -> (f64, f64) {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
    (median, sorted.last().copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_of_a_cell_add_up_and_others_are_compared_with_ours() {
        let mut report = Report::default();
        let round = |count: u64| Measured {
            micros: vec![1000; usize::try_from(count).unwrap()],
            seconds: 1.0,
            ..Measured::default()
        };
        report.add(Work::BlindWrite, 1, "store", round(10));
        report.add(Work::BlindWrite, 1, "etcd", round(5));
        report.add(Work::BlindWrite, 1, "store", round(20));
        assert_eq!(report.cells.len(), 2);
        assert_eq!(report.ours(&report.cells[1]), Some(15.0));
        assert_eq!(report.ours(&report.cells[0]), None);
        assert!(report.line(&report.cells[1]).contains("3.00 × as many"));
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median_and_most(&[3.0, 1.0, 2.0]), (2.0, 3.0));
    }
}
