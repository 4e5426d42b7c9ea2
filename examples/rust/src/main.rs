//! Runs one expert of a packed model, as ../c/run_expert.c does: `run_expert MODEL LAYER EXPERT`.
mod qmoe;

use qmoe::Model;
use std::error::Error;
use std::process::ExitCode;

fn silu(value: f32) -> f32 {
    value / (1.0 + (-value).exp())
}

fn run(path: &str, prefix: &str, number: u32) -> Result<Vec<f32>, Box<dyn Error>> {
    let model = Model::open(path)?;
    let expert = model.expert(model.find_layer(prefix)?, number)?;
    let up = expert.matrix("up")?.ok_or("the expert has no projection with the role up")?;
    let down = expert.matrix("down")?.ok_or("the expert has no projection with the role down")?;
    let x: Vec<f32> = (0..up.columns()).map(|i| (((37 * i + 11) % 101) as f32 - 50.0) / 64.0).collect();
    let h = up.product(&x)?;
    let inner: Vec<f32> = match expert.matrix("gate")? {
        Some(gate) => gate.product(&x)?.iter().zip(&h).map(|(g, h)| silu(*g) * h).collect(),
        None => h.iter().map(|h| silu(*h)).collect(),
    };
    Ok(down.product(&inner)?)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, path, prefix, number] = arguments.as_slice() else {
        eprintln!("usage: run_expert MODEL LAYER EXPERT");
        return ExitCode::from(2);
    };
    let Ok(number) = number.parse() else {
        eprintln!("usage: run_expert MODEL LAYER EXPERT");
        return ExitCode::from(2);
    };
    match run(path, prefix, number) {
        Ok(y) => {
            y.iter().for_each(|value| println!("{value}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("run_expert: {error}");
            ExitCode::FAILURE
        }
    }
}
