//! A checkpoint's headers and index: any bytes give a checkpoint or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvllm::config::ModelFiles;
use rvllm::model::registry::read_config;
use rvllm::model::weights::Checkpoint;

fuzz_target!(|data: &[u8]| {
    // The first byte chooses the file that the rest stands for.
    let Some((&which, data)) = data.split_first() else { return };
    match which % 3 {
        0 => open("model.safetensors", data),
        1 => open("model.safetensors.index.json", data),
        _ => {
            if let Ok(config) = serde_json::from_slice(data) {
                let _ = read_config(&config);
            }
        }
    }
});

fn open(name: &str, data: &[u8]) {
    let dir = tempfile::Builder::new().tempdir_in("/dev/shm").expect("a directory");
    std::fs::write(dir.path().join(name), data).expect("a file");
    if let Ok(checkpoint) = Checkpoint::open(&ModelFiles::Directory(dir.path().to_owned()), "model.") {
        assert!(checkpoint.data_bytes() <= data.len() as u64, "tensors larger than their file");
        let _ = checkpoint.has_fused_experts(0);
        let _ = checkpoint.check(&[]);
    }
}
