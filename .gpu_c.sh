export PYTHONPATH=.:.weights PYTHONUNBUFFERED=1 FLASHCORE_COMMIT=$1
nvidia-smi --query-gpu=name,clocks.sm --format=csv,noheader; cp .whl1/* /tmp/
( timeout 100 python3 -m pytest -q -m gpu tests/testing/test_inputs.py tests/testing/test_problems.py tests/integrations/distributed/test_partial.py tests/integrations/distributed/test_ring.py -p no:cacheprovider > /tmp/t2.log 2>&1; echo "t2 $? $SECONDS"; tail -3 /tmp/t2.log | cut -c1-300 ) &
timeout 120 python3 -m pytest -q -m gpu tests/kernels/test_hopper_mutants.py -p no:cacheprovider > /tmp/mut.log 2>&1; echo "mutants $? $SECONDS"; grep -E "^E  |passed|failed" /tmp/mut.log | cut -c1-700 | head -20
wait
timeout 60 python3 -m flashcore tune --head-dims 128 --heads 8 64 256 --seqlens 2048 4096 --mask causal > /tmp/tune.log 2>&1; echo "tune $? $SECONDS"; tail -9 /tmp/tune.log | cut -c1-150
cp flashcore/tuning/tables/sm90.json $OUT/sm90.json; cp flashcore/tuning/tables/sm90.json /tmp/
timeout 70 python3 .trial/after.py 2>/tmp/after.err; echo "after $? $SECONDS"; tail -3 /tmp/after.err
cat /tmp/t2.log /tmp/mut.log /tmp/tune.log > $OUT/logs_c.txt
