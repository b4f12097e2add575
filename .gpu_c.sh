export PYTHONPATH=.:.weights PYTHONUNBUFFERED=1 FLASHCORE_COMMIT=$1
nvidia-smi --query-gpu=name,clocks.sm --format=csv,noheader
timeout 150 python3 -m pytest -q -m gpu tests/kernels/test_hopper_mutants.py -p no:cacheprovider > /tmp/mut.log 2>&1; echo "mutants $? $SECONDS"; grep -E "^E|passed|failed" /tmp/mut.log | cut -c1-600 | head -20
timeout 130 python3 -m flashcore tune --head-dims 128 --heads 8 64 256 --seqlens 512 1024 2048 4096 > /tmp/tune.log 2>&1; echo "tune $? $SECONDS"; tail -30 /tmp/tune.log | cut -c1-150
cp flashcore/tuning/tables/sm90.json $OUT/sm90.json
timeout 60 python3 .trial/after.py 2>/tmp/after.err; echo "after $? $SECONDS"; tail -3 /tmp/after.err
cat /tmp/mut.log /tmp/tune.log > $OUT/logs_c.txt
